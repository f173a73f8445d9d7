"""What a circuit search writes: circuit.json, with the task, the method, and per model its circuit and controls.

No torch. Faithfulness of a circuit is (m(circuit) - m(corrupted)) / (m(clean) - m(corrupted)), m the mean of the task's
metric over the prompts: a ratio of means. It may lie below 0 and above 1.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = "attnprune-circuit-1"
FAITHFULNESS = "(m(circuit) - m(corrupted)) / (m(clean) - m(corrupted)), m = mean of the metric over the prompts"
TOP_EDGES = 2000

Ranking = Literal["eap-ig abs", "eap-ig signed", "exact nodes", "exact edges"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Interval(_Strict):
    """A number and its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float


class Example(_Strict):
    """A pair of prompts as text."""

    clean: str
    corrupted: str
    answers: list[str]
    wrong: list[str]


class TaskFacts(_Strict):
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


class Method(_Strict):
    """How circuits were measured and chosen."""

    ablation: Literal["corrupt"] = Field(
        default="corrupt", description="edges outside carry their values of the corrupted run"
    )
    faithfulness: str = FAITHFULNESS
    target: float
    band: list[float] = Field(description="[low, high]: faithfulness of a circuit that reaches the target")
    quick: bool
    mask_steps: int = Field(default=0, description="steps of learning a mask over the edges after the search by size")
    refine: bool = Field(description="edges were deleted one block at a time (on train prompts) after that")
    bootstrap: int = Field(description="resamples behind each interval")


class GraphFacts(_Strict):
    """Sizes of the graph (see attnprune.circuit.model.graph)."""

    layers: int
    heads: int = Field(description="heads per layer")
    kv_heads: int
    parallel: bool = Field(description="the MLP of a layer reads the same stream as its heads")
    sources: int
    destinations: int
    edges: int


class Flips(_Strict):
    """Gates that differ between the clean and the corrupted run, and gates open in either."""

    flipped: int
    open: int


class Attribution(_Strict):
    """How far the gradient scores can be trusted."""

    steps: int = Field(description="points between the corrupted and the clean run")
    gap: float = Field(description="|sum of the input's scores - true change| / mean |change|; 0 for a smooth model")
    flips: Flips | None = Field(description="null for a model without gates")


class Point(_Strict):
    """One evaluated size of a ranking, on the validation prompts."""

    edges: int = Field(description="after dangling parts were removed")
    heads: int
    mlps: int
    faithfulness: float


class Curve(_Strict):
    """All evaluated sizes of a ranking, smallest first."""

    ranking: Ranking
    points: list[Point]
    first: int | None = Field(description="edges of the smallest evaluated size inside the band")
    stable: int | None = Field(description="the same, with all larger evaluated sizes inside the band too")


class Edge(_Strict):
    """A scored edge, for example a0.h1->a5.h5<q>; `kept`: it is in the circuit."""

    name: str
    score: float
    kept: bool


class Counts(_Strict):
    """Size of a circuit. Heads and MLPs are those that write to a kept edge."""

    heads: int
    mlps: int
    edges: int
    messages: float | None = Field(
        description="attention messages (head, to, from) per prompt that reach the target within the circuit; null: "
        "not measured"
    )
    open_messages: float | None = Field(
        description="messages per prompt of all heads that any gate lets through (clean or corrupted run), from the "
        "first token on that differs"
    )


class Evaluation(_Strict):
    """A circuit on the test prompts."""

    faithfulness: Interval
    metric: float = Field(description="mean of the task's metric")
    accuracy: float
    kl: float = Field(description="mean KL(model || circuit) of the next token, nats")
    quartiles: list[float] = Field(description="25, 50 and 75 % over prompts of 1 + (m(circuit) - m(clean)) / mean gap")


class RandomCircuits(_Strict):
    """Random circuits of the same number of edges, on the test prompts."""

    draws: int
    faithfulness: float = Field(description="mean over the draws")
    low: float = Field(description="lowest draw")
    high: float = Field(description="highest draw")


class ControlModel(_Strict):
    """A search by EAP-IG alone in a model that was broken on purpose."""

    accuracy: float
    clean: float = Field(description="mean metric of the clean test prompts")
    corrupted: float
    able: bool = Field(description="it still does the task; if not, its circuits explain no behaviour")
    edges: int | None = Field(description="smallest size inside the band with all larger ones; null: only all edges")
    faithfulness: float = Field(description="of its own circuit of the size of the real one, validation prompts")
    recovered: float | None = Field(
        default=None,
        description="largest (m(circuit) - m(corrupted)) / (gap of the intact model) of its evaluated circuits: what "
        "choosing edges alone can make up",
    )


class Templates(_Strict):
    """Circuits of the same size found for each template alone (EAP-IG), and how far they agree."""

    templates: list[int] = Field(description="indices into task.templates that had train prompts")
    jaccard: list[list[float]] = Field(description="shared / all edges of each pair of them")
    mean: float | None = Field(description="mean over different pairs; null with fewer than two templates")


class Controls(_Strict):
    """What a circuit is worth; null where a control was left out or does not apply."""

    complement: float | None = Field(default=None, description="faithfulness of all other edges, test prompts")
    random: RandomCircuits | None = None
    random_weights: ControlModel | None = None
    shuffled_gates: ControlModel | None = Field(default=None, description="null for a dense model")
    templates: Templates | None = None


class ModelCircuit(_Strict):
    """A model, its circuit and what the controls say."""

    name: str
    kind: Literal["dense", "sparse"]
    family: str
    graph: GraphFacts
    accuracy: float = Field(description="on the clean test prompts")
    clean: float = Field(description="mean metric, clean test prompts")
    corrupted: float = Field(description="mean metric, corrupted test prompts")
    attribution: Attribution
    curves: list[Curve]
    ranking: Ranking = Field(description="the ranking that reached the target with the fewest edges")
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
    reached: bool = Field(description="the interval of the faithfulness on test prompts reaches the target")
    controls: Controls
    seconds: float = Field(description="of the last part, if the search was interrupted")


class Ratio(_Strict):
    """Other model / this model. The interval is that of the circuits found by ranking."""

    value: float | None = Field(description="chosen circuits; null where one has none")
    ranked: Interval | None = Field(description="circuits found by ranking, 95 % bootstrap over validation prompts")


class Compare(_Strict):
    """models[1] against models[0]: ratios above 1 mean that models[0] has the smaller circuit."""

    comparable: bool
    reasons: list[str] = Field(description="why not")
    heads: Ratio
    mlps: Ratio
    edges: Ratio
    messages: Ratio
    first_in_second: float = Field(description="faithfulness of the circuit of models[0] in models[1], test prompts")
    second_in_first: float
    jaccard: float = Field(description="shared / all edges of the two circuits")


class CircuitResult(_Strict):
    """A circuit search of one model, or of two on the same prompts."""

    schema_id: Literal["attnprune-circuit-1"] = SCHEMA
    command: str = Field(description="that began the search")
    task: TaskFacts
    method: Method
    models: list[ModelCircuit]
    compare: Compare | None
    seconds: float = Field(description="of the last part, if the search was interrupted")
    notes: list[str]
