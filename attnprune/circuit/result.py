"""What a circuit search writes: circuit.json, with the task, the method, and per model its circuit and controls.

No torch. Faithfulness of a circuit is (m(circuit) - m(corrupted)) / (m(clean) - m(corrupted)), m the mean of the task's
metric over the prompts: a ratio of means. It may lie below 0 and above 1.

A circuit reaches the target if its faithfulness on validation prompts, which chose it, lies in the band
[target, 2 - target], and if test prompts show, with 95 % confidence on either side, that it lies in the band widened by
`MARGIN`. Otherwise nothing is said against the circuit: it is not shown with so many prompts. More prompts narrow the
bounds, so they make it easier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from attnprune.circuit.record import Interval, Number, Strict
from attnprune.circuit.worth import Ablation, Controls, Published
from attnprune.late import Shown

SCHEMA, FIRST_SCHEMA = "attnprune-circuit-2", "attnprune-circuit-1"
MARGIN = 0.05  # of the faithfulness: so far outside the band may it lie for all that the test prompts show
FAITHFULNESS = "(m(circuit) - m(corrupted)) / (m(clean) - m(corrupted)), m = mean of the metric over the prompts"
BOUNDS = (
    "percentiles of a bootstrap over the test prompts and one more, on which the circuit explains nothing (upper "
    "bound: twice the gap), so that few prompts which happen to agree show little"
)
TOP_EDGES = 2000
NOT_CLEAR = "not clearly below its nonsense control"

Level = Literal["nodes", "edges", "messages"]
Ranking = Literal["eap-ig abs", "eap-ig signed", "exact nodes", "exact edges"]


class Example(Strict):
    """A pair of prompts as text."""

    clean: str
    corrupted: str
    answers: list[str]
    wrong: list[str]


class TaskFacts(Strict):
    """The prompts. All models of a file were given the same ones."""

    name: str
    metric: Literal["logit_difference", "probability_difference"]
    templates: list[str]
    fingerprint: str = Field(description="sha256 over all prompts of all splits")
    seed: int
    train: int = Field(description="prompt pairs that edges were ranked on")
    more: int = Field(default=0, description="prompt pairs, with those of train, that masks were learned on")
    validation: int = Field(description="prompt pairs that sizes were decided on")
    test: int = Field(description="prompt pairs that all reports are about")
    lengths: list[int] = Field(description="tokens of the test prompts: shortest, longest")
    example: Example = Field(description="the first test pair")
    chance: float | None = Field(
        default=None,
        description="accuracy of a guess among the answers and the wrong tokens, mean over the test prompts; null: the "
        "first version of this format did not record it",
    )


class Method(Strict):
    """How circuits were measured and chosen."""

    ablation: Ablation = Field(
        default="corrupt",
        description="what edges outside carry: their values of the corrupted run, what their source writes on average "
        "over the train prompts and positions, nothing (zero), or each of the three for a third of the prompts (mixed)",
    )
    faithfulness: str = FAITHFULNESS
    target: float
    band: list[float] = Field(description="[low, high]: where the faithfulness on validation prompts has to lie")
    margin: float = Field(
        default=MARGIN, description="so far outside the band may the bounds of the faithfulness on test prompts lie"
    )
    bounds: str = Field(default=BOUNDS, description="what the one-sided bounds are")
    quick: bool
    mask_steps: int = Field(default=0, description="steps of learning a mask; up to three times as many where needed")
    refine: bool = Field(description="edges were deleted one block at a time (on train prompts) after that")
    bootstrap: int = Field(description="resamples behind each interval")


class GraphFacts(Strict):
    """Sizes of the graph (see attnprune.circuit.model.graph)."""

    layers: int
    heads: int = Field(description="heads per layer")
    kv_heads: int
    parallel: bool = Field(description="the MLP of a layer reads the same stream as its heads")
    sources: int
    destinations: int
    edges: int


class Flips(Strict):
    """Gates that differ between the clean and the corrupted run, and gates open in either."""

    flipped: int
    open: int


class Attribution(Strict):
    """How far the gradient scores can be trusted."""

    steps: int = Field(description="points between the corrupted and the clean run")
    gap: Number = Field(description="|sum of the input's scores - true change| / mean |change|; 0 for a smooth model")
    flips: Flips | None = Field(description="null for a model without gates")


class Point(Strict):
    """One evaluated size of a ranking, on the validation prompts."""

    edges: int = Field(description="after dangling parts were removed")
    heads: int
    mlps: int
    faithfulness: Number


class Curve(Strict):
    """All evaluated sizes of a ranking, smallest first."""

    ranking: Ranking
    points: list[Point]
    first: int | None = Field(description="edges of the smallest evaluated size inside the band")
    stable: int | None = Field(description="the same, with all larger evaluated sizes inside the band too")


class Edge(Strict):
    """A scored edge, for example a0.h1->a5.h5<q>; `kept`: it is in the circuit."""

    name: str
    score: Number
    kept: bool


class Counts(Strict):
    """Size of a circuit. Heads and MLPs are those that write to a kept edge."""

    heads: int
    mlps: int
    edges: int
    messages: float | None = Field(
        description="attention messages (head, to, from) per prompt that keep the circuit in the band on validation "
        "prompts; null: not measured"
    )
    open_messages: float | None = Field(
        description="messages per prompt of all heads that any gate lets through (clean or corrupted run), from the "
        "first token on that differs"
    )


class Evaluation(Strict):
    """A circuit on the test prompts."""

    faithfulness: Interval
    lower: float | None = Field(
        default=None,
        description="one-sided 95 % lower bound of the faithfulness (see method.bounds); null: not measured",
    )
    upper: float | None = Field(default=None, description="the upper one")
    each: list[tuple[float, float, float]] | None = Field(
        default=None, description="metric of (circuit, clean, corrupted) for every test prompt; null: not recorded"
    )
    metric: float = Field(description="mean of the task's metric")
    accuracy: float
    kl: Number = Field(description="mean KL(model || circuit) of the next token, nats")
    quartiles: list[float] = Field(description="25, 50 and 75 % over prompts of 1 + (m(circuit) - m(clean)) / mean gap")


def is_reached(band: Sequence[float], validation: float, test: Evaluation, margin: float = MARGIN) -> bool:
    """Whether a circuit is shown to reach the target whose band is [low, high]; never without bounds."""
    low, high = band
    if test.lower is None or test.upper is None or not low <= validation <= high:
        return False
    return low - margin < test.lower and test.upper < high + margin


class LevelCircuit(Strict):
    """The smallest circuit found on one level, by one search with its own prompts."""

    level: Level
    seed: int
    size: float = Field(description="heads and MLPs; component edges; attention messages (head, to, from) per prompt")
    whole: float = Field(description="the same of the whole model")
    ranked: float = Field(description="size found by ranking")
    validation_faithfulness: float
    faithfulness: Interval = Field(description="on test prompts")
    lower: float | None = Field(description="one-sided 95 % bounds on test prompts")
    upper: float | None
    reached: bool = Field(description="as for the edges")


class LevelRatio(Strict):
    """Other model / this model on one level: geometric mean over the searches."""

    level: Level
    searches: int
    value: float | None = Field(description="null where a model has no circuit")
    low: float | None = Field(description="95 %, paired bootstrap over the searches and their validation prompts")
    high: float | None


class ModelCircuit(Strict):
    """A model, its circuit and what the controls say."""

    name: str
    kind: Literal["dense", "sparse"]
    family: str
    graph: GraphFacts
    accuracy: float = Field(description="on the clean test prompts")
    clean: float = Field(description="mean metric, clean test prompts")
    corrupted: float = Field(description="mean metric without any edge, test prompts: that of the corrupted prompts")
    attribution: Attribution
    curves: list[Curve]
    ranking: Ranking = Field(description="the ranking that came into the band with the fewest edges")
    ranked: Counts = Field(description="size found by ranking (messages: null)")
    learned: Counts | None = Field(
        default=None,
        description="size of the learned circuit before deletion; null: none smaller held, or none learned",
    )
    counts: Counts
    heads: list[str]
    mlps: list[str]
    edges: list[Edge] = Field(description="the circuit, strongest first")
    top_edges: list[Edge] = Field(description="the best edges of the ranking, in its order, up to 2000")
    validation_faithfulness: float
    test: Evaluation
    reached: bool = Field(
        description="validation_faithfulness lies in method.band, test.lower and test.upper in the band widened by "
        "method.margin; false: not shown with so many prompts"
    )
    levels: list[LevelCircuit] = Field(default=[], description="every level of every search")
    published: Published | None = Field(default=None, description="the published procedure; null: not asked for")
    controls: Controls
    seconds: float = Field(description="of the last part, if the search was interrupted")


class Ratio(Strict):
    """Other model / this model. The interval is that of the circuits found by ranking."""

    value: float | None = Field(description="chosen circuits; null where one has none")
    ranked: Interval | None = Field(description="circuits found by ranking, 95 % bootstrap over validation prompts")


class PublishedRatios(Strict):
    """Other model / this model, counted as published."""

    heads: float | None
    edges: float | None
    token_edges: float | None


class Compare(Strict):
    """models[1] against models[0]: ratios above 1 mean that models[0] has the smaller circuit."""

    comparable: bool
    reasons: list[str] = Field(description="why not")
    heads: Ratio
    mlps: Ratio
    edges: Ratio
    messages: Ratio
    levels: list[LevelRatio] = Field(default=[], description="sizes on every level")
    published: PublishedRatios | None = None
    first_in_second: Number = Field(description="faithfulness of the circuit of models[0] in models[1], test prompts")
    second_in_first: Number
    jaccard: float = Field(description="shared / all edges of the two circuits")


class CircuitResult(Shown, Strict):
    """A circuit search of one model, or of two on the same prompts."""

    schema_id: Literal["attnprune-circuit-2"] = SCHEMA
    command: str = Field(description="that began the search")
    task: TaskFacts
    method: Method
    models: list[ModelCircuit]
    compare: Compare | None
    seconds: float = Field(description="of the last part, if the search was interrupted")
    notes: list[str]

    def __repr__(self) -> str:
        models = "; ".join(
            f"{m.name}: {m.counts.edges:,} of {m.graph.edges:,} edges, faithfulness {m.test.faithfulness.value:.3f} "
            f"({'; '.join(['reached' if m.reached else 'not shown', *doubts(m)])})"
            for m in self.models
        )
        return f"CircuitResult({self.task.name}, {models})"

    @model_validator(mode="before")
    @classmethod
    def _of_first_version(cls, data: Any) -> Any:
        """A record of the first version: it called a target reached if any part of an interval lay in the band.

        It holds no bounds, so its circuits are not shown to reach the target.
        """
        if not isinstance(data, dict) or data.get("schema_id") != FIRST_SCHEMA:
            return data
        models = data.get("models")
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            return data
        names = [model.get("name") for model in models]
        data = data | {
            "schema_id": SCHEMA,
            "models": [model | {"reached": False} for model in models],
            "notes": [*data.get("notes", []), FIRST_NOTE],
        }
        compare = data.get("compare")
        if isinstance(compare, dict):
            others = [reason for reason in compare.get("reasons", []) if not reason.endswith(_MISSED)]
            reasons = [*others, *map(not_shown, names)]
            data["compare"] = compare | {"comparable": False, "reasons": reasons}
        return data


FIRST_NOTE = (
    f"written as {FIRST_SCHEMA}, without the bounds that show whether a target is reached: search again, or judge the "
    "circuit on its test prompts again with examples/judge_circuits.py"
)
_MISSED = "its circuit misses the target on test prompts"  # what that version said


def not_shown(name: Any) -> str:
    """Why a model cannot be compared."""
    return f"{name}: its circuit is not shown to reach the target"


def doubts(model: ModelCircuit) -> list[str]:
    """What has to be said wherever a circuit is shown: controls that it does not pass, or that were not run."""
    found = []
    nonsense, stress = model.controls.nonsense, model.controls.stress
    if nonsense is None:
        found.append("no nonsense control")
    elif not nonsense.clear:
        found.append(NOT_CLEAR)
    if stress is not None and not stress.holds:
        worst = stress.worst_trial
        at = (
            ""
            if worst is None
            else f", {worst.faithfulness:.2f} with {100 * worst.share:g} % {worst.ablation} ablation"
        )
        found.append(f"does not hold under every ablation{at}")
    return found
