"""What the controls say of a circuit, as circuit.json has it. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from attnprune.circuit.record import Number, Strict

AblationKind = Literal["corrupt", "mean", "zero"]
Ablation = Literal["corrupt", "mean", "zero", "mixed"]
Procedure = Literal["exact", "published"]
PROCEDURES: tuple[Procedure, ...] = ("exact", "published")
KINDS: tuple[AblationKind, ...] = ("corrupt", "mean", "zero")
ABLATIONS: tuple[Ablation, ...] = (*KINDS, "mixed")
CLEARLY_BELOW = 0.5  # of the nonsense control's edges
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the other edges that are ablated in a stress test


class RandomCircuits(Strict):
    """Random circuits of the same number of edges, on the test prompts."""

    draws: int
    faithfulness: Number = Field(description="mean over the draws")
    low: Number = Field(description="lowest draw")
    high: Number = Field(description="highest draw")


class ControlModel(Strict):
    """A search by EAP-IG alone in a model that was broken on purpose."""

    accuracy: float
    clean: Number = Field(description="mean metric of the clean test prompts")
    corrupted: Number
    able: bool = Field(description="it still does the task; if not, its circuits explain no behaviour")
    edges: int | None = Field(description="smallest size inside the band with all larger ones; null: only all edges")
    faithfulness: Number = Field(description="of its own circuit of the size of the real one, validation prompts")
    recovered: Number = Field(
        default=None,
        description="largest (m(circuit) - m(corrupted)) / (gap of the intact model) of its evaluated circuits: what "
        "choosing edges alone can make up",
    )


class Templates(Strict):
    """Circuits of the same size found for each template alone (EAP-IG), and how far they agree."""

    templates: list[int] = Field(description="indices into task.templates that had train prompts")
    jaccard: list[list[float]] = Field(description="shared / all edges of each pair of them")
    mean: float | None = Field(description="mean over different pairs; null with fewer than two templates")


class Nonsense(Strict):
    """The same search, with the same prompts and budget, for answers that mean nothing.

    Each prompt has the answers of another one, and for every second prompt right and wrong change places, so nothing in
    a prompt tells what to answer. Here faithfulness is the share of the intact model's gap of the real task that a
    circuit moves the answers by: what choosing edges alone can make up.
    """

    edges: int | None = Field(
        description="smallest circuit inside the band on validation prompts; null: none was found"
    )
    best: int = Field(
        description="edges of the circuit measured here: that one, or the one that comes nearest the band"
    )
    train: Number = Field(description="its faithfulness on train prompts, which it was made on")
    validation: Number
    test: Number
    lower: Number = Field(description="one-sided 95 % bounds on test prompts, see method.bounds")
    upper: Number
    clear: bool = Field(
        description="the real circuit is clearly below: this search found none and upper is below the lower bound of "
        f"the real one, or the real one has at most {CLEARLY_BELOW:g} of its edges"
    )


class Trial(Strict):
    """The circuit on test prompts while each other edge is ablated independently with probability `share`."""

    ablation: AblationKind
    share: float = Field(description="1: all other edges, as in the search")
    draws: int = Field(description="random choices of the ablated edges")
    faithfulness: Number = Field(description="mean over the draws; null: this ablation takes nothing from the metric")
    low: Number = Field(description="lowest draw")
    high: Number = Field(description="highest draw")


class Stress(Strict):
    """Whether a circuit holds however the other edges are ablated."""

    trials: list[Trial]
    worst: Number = Field(description="faithfulness of the trial that is farthest from 1")
    holds: bool = Field(description="every trial lies in the band widened by method.margin")

    @property
    def worst_trial(self) -> Trial | None:
        """The trial farthest from 1."""
        return next((trial for trial in self.trials if trial.faithfulness == self.worst), None)


class Published(Strict):
    """The circuit counted as published: heads by activation patching, cumulated; see attnprune.circuit.published."""

    heads: int | None = Field(description="that bring the target's share of the gap back; null: all heads do not")
    recovered: float = Field(description="share of the gap that comes back with them, validation prompts")
    edges: int = Field(description="component edges among them: from a head to the query, key or value of another")
    token_edges: float = Field(description="their open attention edges (head, to, from) per prompt, clean run")
    names: list[str] = Field(description="the heads, for example a5.h1")


class Controls(Strict):
    """What a circuit is worth; null where a control was left out or does not apply."""

    complement: Number = Field(default=None, description="faithfulness of all other edges, test prompts")
    random: RandomCircuits | None = None
    random_weights: ControlModel | None = None
    shuffled_gates: ControlModel | None = Field(default=None, description="null for a dense model")
    templates: Templates | None = None
    nonsense: Nonsense | None = None
    stress: Stress | None = None
