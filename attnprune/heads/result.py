"""What an atlas writes: atlas.json, a dossier of every head over a text; and the rule by which a head gets a label.

No torch. Every head is read in one or two ways. By edges: each open edge counts 1 (sparse models). By mass: each pair
counts its weight P_ij A_ij, so that the weights of a query add up to at most 1. A kind's share is the part of this
total that falls on pairs of the kind. Its control is the share to be expected if the keys of each query were drawn
anew: as many open edges (as much mass) in each query, on keys chosen uniformly among all that the query sees. It is
computed exactly, from the keys of the kind that each query sees; nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from attnprune.circuit.record import Strict
from attnprune.late import Shown

SCHEMA = "attnprune-atlas-1"
KINDS = {
    "self": "the key is the query",
    "first": "the first token of the block, seen from a later one",
    "previous": "the token before the query",
    "same": "an earlier token equal to the query",
    "induction": "an earlier token whose predecessor equals the query",
    "delimiter": "an earlier token of punctuation or line breaks only",
    "offset": "one fixed distance: the head's most common one above 1",
}
AROUND = 7  # tokens before an end of an example, and half as many behind
LEAST_SHARE, TIMES, LEAST_EDGES = 0.5, 3, 20
RULE = f"share >= {LEAST_SHARE:g} and share >= {TIMES} x control, in a head with at least {LEAST_EDGES} open edges"
CONTROL = "the share with each query's edges (or mass) on uniformly drawn keys that it sees; computed, not drawn"
STRENGTH = "P_ij times the norm of what the head's output map makes of the value at the key"

Text = Callable[[int], str]
"""A token as text."""


class Share(Strict):
    """Part of a head's edges or mass, and the part to be expected by chance."""

    share: float
    control: float


class Reading(Strict):
    """Where the edges or the mass of a head go. Kinds overlap, so shares need not add up to 1."""

    total: float = Field(description="open edges, or attention mass")
    kinds: dict[str, Share] = Field(description="of every kind; all 0 where the total is 0")
    offset: int = Field(description="distance of the kind `offset`, in tokens; 0 where nothing is farther than 1")
    distances: list[float] = Field(description="share by distance, in the buckets of `offset_edges`")
    labels: list[str] = Field(description="kinds that pass the rule, the largest share first")


class Window(Strict):
    """Consecutive tokens of a block."""

    start: int = Field(description="position of the first one in the block")
    tokens: list[str]


class Example(Strict):
    """One edge in context. A key appears once per block and head, with the query that gets most from it."""

    block: int
    query: int = Field(description="position that receives")
    key: int = Field(description="position that is read")
    weight: float = Field(description="P_ij")
    strength: float = Field(description=STRENGTH)
    text: list[Window] = Field(description="around key and query; one window if they are near")


class Direction(Strict):
    """An output direction of W_V W_O through the unembedding; its sign means nothing, so both sides are given."""

    share: float = Field(
        description="of the squared Frobenius norm of W_V W_O: its squared singular value over their sum"
    )
    raises: list[str] = Field(description="tokens it promotes most")
    lowers: list[str] = Field(description="tokens its opposite promotes most")


class Head(Strict):
    """The dossier of a head."""

    layer: int
    head: int
    open: int = Field(description="open edges in the text (all visible pairs, if dense)")
    visible: int = Field(description="pairs that the head sees")
    queries: float = Field(description="share of the queries with an open edge")
    edges_per_query: float
    edges: Reading | None = Field(description="by open edges; null in a dense model, where all are open")
    mass: Reading = Field(description="by attention mass P_ij A_ij")
    examples: list[Example] = Field(description="the strongest first")
    directions: list[Direction] = Field(description="the largest singular value first")

    @property
    def closed(self) -> bool:
        """No edge is open in the text."""
        return self.open == 0

    @property
    def reading(self) -> Reading:
        """By edges where there are gates, else by mass."""
        return self.edges or self.mass


class ModelAtlas(Strict):
    """Every head of one model, by layer and head."""

    name: str
    kind: Literal["sparse", "dense"]
    layers: int
    heads_per_layer: int
    heads: list[Head]
    closed: list[tuple[int, int]] = Field(description="(layer, head) without an open edge in the text")
    seconds: float


class Atlas(Shown, Strict):
    """atlas.json."""

    schema_id: Literal["attnprune-atlas-1"] = SCHEMA
    command: str
    data: str
    tokens: int
    blocks: int
    seq_len: int
    offset_edges: list[int] = Field(description="bucket b covers distances edges[b] <= query - key < edges[b + 1]")
    kinds: dict[str, str] = KINDS
    rule: str = RULE
    control: str = CONTROL
    strength: str = STRENGTH
    models: list[ModelAtlas] = Field(description="the model, then the dense base of a sparse one")
    notes: list[str]
    seconds: float

    def __repr__(self) -> str:
        models = "; ".join(
            f"{m.name}: {sum(bool(head.reading.labels) for head in m.heads):,} of {len(m.heads):,} heads labelled"
            + (f", {len(m.closed):,} closed" if m.kind == "sparse" else "")
            for m in self.models
        )
        return f"Atlas({self.data!r}, {self.tokens:,} tokens, {models})"


def labels(kinds: dict[str, Share], open_edges: int) -> list[str]:
    """The kinds that pass the rule, the largest share first."""
    if open_edges < LEAST_EDGES:
        return []
    passed = [name for name, k in kinds.items() if k.share >= LEAST_SHARE and k.share >= TIMES * k.control]
    return sorted(passed, key=lambda name: -kinds[name].share)


def windows(ids: Sequence[int], query: int, key: int, text: Text) -> list[Window]:
    """The tokens around key and query, in one window where they meet."""
    spans = [(max(0, at - AROUND), min(len(ids), at + AROUND // 2 + 1)) for at in (key, query)]
    if spans[1][0] <= spans[0][1]:
        spans = [(spans[0][0], spans[1][1])]
    return [Window(start=start, tokens=list(map(text, ids[start:end]))) for start, end in spans]
