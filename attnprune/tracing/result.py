"""What a trace writes: trace.json, with the prediction, and per model the messages that keep it and their controls.

No torch. A message is one attention edge of one head in one layer: what the query position gets from the key position,
P_ij A_ij v_j. Closing it takes exactly that away, as a closed gate does: nothing is renormalised, and a query without
an open message gets 0. The messages that stay keep their own gates, whose scores may move when others are closed.

The share of the prediction that a set of messages keeps is 1 - KL(full || set) / KL(full || none), in nats at the
token: 1 for the full run, 0 with every message closed, and below 0 for a set that is worse than none.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from attnprune.circuit.record import Opening, Strict
from attnprune.late import Shown

SCHEMA = "attnprune-trace-1"
CLOSING = "P_ij A_ij v_j = 0 for every message outside the set; softmax over all visible keys, nothing renormalised"
SHARE = "1 - KL(full || set) / KL(full || none), at the token"


class Token(Strict):
    """A token of the vocabulary and its text."""

    id: int
    text: str


class Candidate(Token):
    """A token as the next one, in the full run."""

    probability: float


class Shift(Token):
    """How far a message's value moves a logit: against the mean over the vocabulary, by its own path alone."""

    logit: float


class Measured(Strict):
    """An exact run with only `size` messages open."""

    size: int
    kl: float = Field(description="KL(full || this run) at the token, nats")
    share: float = Field(description="of the prediction kept: " + SHARE)
    difference: float = Field(description="logit of the predicted token less that of the other one")
    probability: float = Field(description="of the predicted token")
    same: bool = Field(description="the predicted token is still the most likely one")


class RandomSets(Strict):
    """Sets of the size of the kept one, drawn from the same messages; mean and range of the draws."""

    draws: int
    kl: float
    kl_low: float
    kl_high: float
    share: float
    share_low: float
    share_high: float


class Message(Strict):
    """A message of the kept set."""

    layer: int
    head: int
    query: int = Field(description="position that receives")
    key: int = Field(description="position that is read")
    weight: float = Field(description="attention weight P_ij in the full run")
    effect: float = Field(description="KL(full || kept set without it) - KL(full || kept set), nats")
    exact: bool = Field(description="`effect` was measured by a run without it; else it is estimated by gradients")
    raises: list[Shift] = Field(description="tokens that its value raises most, by the final norm's scale at the query")
    lowers: list[Shift]
    opened: Opening | None = Field(
        default=None, description="why its edge is open, with the largest writers; null: not asked"
    )


class ModelTrace(Strict):
    """The messages that keep the prediction of one model, the most effective first, and what they are worth."""

    name: str
    kind: Literal["sparse", "dense"]
    layers: int
    heads: int = Field(description="heads per layer")
    visible: int = Field(description="pairs of tokens up to the traced one, over all heads of all layers")
    open: int = Field(description="messages that are sent: pairs with an open gate (all visible ones, if dense)")
    candidates: int = Field(description="open messages that can reach the prediction; sets are drawn from these")
    predicted: Candidate
    against: Candidate = Field(description="the token that logit differences compare with")
    full: Measured
    closed: Measured = Field(description="every message closed")
    kept: Measured
    complement: Measured = Field(description="all candidates but the kept messages")
    random: RandomSets
    messages: list[Message]
    curve: list[Measured] = Field(description="the first `size` messages of the list alone")
    minimal: bool = Field(description="without any one of its messages the set misses the target: each was tried")
    can_go: int | None = Field(
        default=None, description="messages of the set that could go alone; null: not each was tried"
    )
    runs: int = Field(description="runs of the model behind this")
    seconds: float


class Trace(Shown, Strict):
    """trace.json."""

    schema_id: Literal["attnprune-trace-1"] = SCHEMA
    command: str
    text: str
    tokens: list[Token] = Field(description="of the text up to the traced one")
    position: int = Field(description="the token behind which the prediction stands")
    target: float = Field(description="share of the prediction to keep")
    given: bool = Field(description="the other token was chosen; else it is the runner-up of each model")
    closing: str = CLOSING
    share: str = SHARE
    seed: int
    models: list[ModelTrace] = Field(description="the model, then the dense base of a sidecar")
    notes: list[str]
    seconds: float

    def __repr__(self) -> str:
        models = "; ".join(
            f"{m.name}: {len(m.messages):,} of {m.open:,} messages keep {m.kept.share:.3f}" for m in self.models
        )
        return f"Trace({self.text!r} -> {self.models[0].predicted.text!r}, {models})"
