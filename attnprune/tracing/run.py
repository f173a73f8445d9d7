"""A whole trace: model and text by name, the search, its controls, the dense base beside a sparse model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnprune.circuit.explained import opening
from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.model.explain import explain as explain_edge
from attnprune.circuit.search.splits import pattern_visible
from attnprune.data.vocabulary import ids_of
from attnprune.errors import InputError, checked
from attnprune.sidecar import bases
from attnprune.sidecar.models import Named, models_of
from attnprune.tracing.messages import Messages
from attnprune.tracing.moved import top_shifts
from attnprune.tracing.result import Candidate, Measured, Message, ModelTrace, RandomSets, Shift, Token, Trace
from attnprune.tracing.search import Watch, prefix_sizes, smallest
from attnprune.units import counted

MAX_TOKENS = 512
LEAST_PROBABILITY = 1e-6  # of a token that the model is said to predict
LEAST_KL = 1e-6  # nats; attention that changes less takes no part in a prediction
LITTLE_KL = 0.01  # nats; a prediction that attention changes less hardly needs it, which is said
DRAWS = 8
WRITERS = 5  # that are shown, and removed, on either side of an explained edge
SHIFTS = 5  # tokens that a value raises most, and as many that it lowers


@dataclass(frozen=True)
class _Asked:
    """What a trace is about: token ids [1, T], the other token or None, the share to keep, messages to explain."""

    ids: Tensor
    against: int | None
    target: float
    seed: int
    explain: int


@checked(explain=0, seed=0)
def trace(
    model: Any,
    text: str,
    *,
    tokenizer: Any = None,
    token: int = -1,
    target: float = 0.9,
    against: str | None = None,
    base: str | Path | None = None,
    dense: bool = True,
    explain: int = 0,
    device: str = "auto",
    seed: int = 0,
    watch: Watch = lambda stage, done, of: None,
    command: str = "",
) -> Trace:
    """Find the smallest set of attention messages that keeps one prediction, with all others closed exactly.

    Args:
        model: sidecar or merged folder, base model, Hub name, .gguf file or "demo"; or a model in memory, sparse or
            dense, with its `tokenizer` or as the pair that `attnprune.load` gives.
        text: at most 512 tokens, and no more than the model's context.
        token: the token (0 is the first, -1 the last) behind which the prediction stands; later ones are left out.
        target: share of the prediction to keep, above 0 and up to 1: 1 - KL(full || kept) / KL(full || none), in nats.
        against: a token as text; logit differences are those of the predicted token less this one. Default: the
            runner-up of the model.
        base: base of a sidecar or merged folder, where it has to be named.
        dense: trace the dense base beside a sparse model that is given by name.
        explain: messages, from the most effective on, to say of why their edges are open: what was written into query
            and key, and the score without it.
        device: auto, cpu or cuda, for models given by name.
        seed: of the random sets.
        watch: told the stage and how far it is.

    Raises:
        InputError: an empty or too long text, a token index out of range, `against` that is not one token or that the
            model does not predict, attention that takes no part in the prediction.
        UnsupportedModelError: no adapter for the family; scores with a soft cap cannot be explained.
    """
    started = time.monotonic()
    if not 0 < target <= 1:
        raise InputError(f"target {target:g}: is not above 0 and up to 1")
    if not text:
        raise InputError("text: is empty")
    notes: list[str] = []
    traces: list[ModelTrace] = []
    asked: _Asked | None = None
    tokens: list[Token] = []
    for named in models_of(model, tokenizer, base, device, dense, notes):
        if asked is None:
            asked = _ask(named, text, token, target, against, seed, explain)
            tokens = [_token(named.tokenizer, index) for index in asked.ids[0].tolist()]
        traces.append(_trace_model(named, asked, watch, notes))
    assert asked is not None
    return Trace(
        command=command, text=text, tokens=tokens, position=len(tokens) - 1, target=target, given=against is not None,
        seed=seed, models=traces, notes=notes, seconds=time.monotonic() - started,
    )  # fmt: skip


def _ask(named: Named, text: str, token: int, target: float, against: str | None, seed: int, explain: int) -> _Asked:
    """Text and options as tokens of the model."""
    ids = ids_of(text, named.tokenizer, named.model.config.vocab_size, "text")
    length = ids.shape[1]
    if length == 0:
        raise InputError("text: has no tokens")
    longest = min(MAX_TOKENS, bases.context_length(named.model) or MAX_TOKENS)
    if length > longest:
        raise InputError(f"text: {length} tokens are more than the {longest} that can be traced")
    if not -length <= token < length:
        raise InputError(f"token {token}: the text has {counted(length, 'token')}, 0 to {length - 1}")
    ids = ids[:, : token % length + 1].to(named.model.device)
    return _Asked(ids, None if against is None else _single_token(named, against), target, seed, explain)


def _single_token(named: Named, against: str) -> int:
    """The one token that a text is.

    Raises:
        InputError: it is none or several, unknown, or beyond the model's vocabulary.
    """
    where = f"against {against!r}"
    ids = ids_of(against, named.tokenizer, named.model.config.vocab_size, where, add_special_tokens=False)[0]
    if len(ids) != 1:
        pieces = " ".join(repr(named.tokenizer.decode([index])) for index in ids[:6].tolist())
        raise InputError(
            f"{where}: is {len(ids)} tokens{': ' if len(ids) else ''}{pieces}, not one",
            hint="most words are a token with the space before them, as in ' Mary'",
        )
    return int(ids[0])


def _trace_model(named: Named, asked: _Asked, watch: Watch, notes: list[str]) -> ModelTrace:
    started = time.monotonic()
    anatomy = anatomy_of(named.model)
    kind = "sparse" if anatomy.gated else "dense"

    def told(stage: str, done: int, of: int) -> None:
        watch(f"{kind}: {stage}", done, of)

    with pattern_visible(anatomy):
        messages = Messages(anatomy, asked.ids)
        pair = _pair(messages, named, asked.against, notes)
        every = torch.arange(len(messages), device=messages.device)
        none = every[:0]
        closed = messages.kl([none]).item()
        if closed < LEAST_KL:
            raise InputError(f"{named.name}: with every message closed the prediction is the same: nothing to trace")
        if closed < LITTLE_KL:
            notes.append(
                f"{named.name}: this prediction hardly needs attention: closing every message moves it by {closed:.2g} "
                "nats, and shares of so little mean little"
            )
        found = smallest(messages, (1 - asked.target) * closed, told)
        told("controls", 0, 1)
        size = len(found.kept)
        if not found.exact:
            notes.append(
                f"{named.name}: {size:,} messages are too many to leave out one by one: effects (≈) are derivatives, "
                "which can be far off for a single message, and some messages may be able to go"
            )
        others = every[~torch.isin(every, found.kept)]
        generator = torch.Generator().manual_seed(asked.seed)
        drawn = [every[torch.randperm(len(every), generator=generator)[:size]] for _ in range(DRAWS)]
        prefixes = [found.kept[:count] for count in prefix_sizes(size)]
        sets = [every, none, found.kept, others, *drawn, *prefixes]
        full, all_closed, kept, complement, *rest = _measure(messages, sets, pair, closed)
        if not kept.same:
            notes.append(f"{named.name}: with the kept messages alone another token is the likeliest")
        described = _described(messages, named.tokenizer, found.kept, found.effects, found.exact)
        for number, message in enumerate(described[: asked.explain]):
            told("why they are open", number, asked.explain)
            edge = (message.layer, message.head, message.query, message.key)
            why = explain_edge(anatomy, asked.ids, edge, dense=kind == "dense", removed=WRITERS)
            message.opened = opening(why, WRITERS)
        return ModelTrace(
            name=named.name, kind=kind, layers=anatomy.graph.layers, heads=anatomy.graph.heads,
            visible=anatomy.graph.layers * anatomy.graph.heads * asked.ids.shape[1] * (asked.ids.shape[1] + 1) // 2,
            open=int((messages.weights != 0).sum()), candidates=len(messages),
            predicted=_candidate(messages, named.tokenizer, pair[0]),
            against=_candidate(messages, named.tokenizer, pair[1]),
            full=full, closed=all_closed, kept=kept, complement=complement, random=_random(rest[:DRAWS]),
            messages=described,
            curve=rest[DRAWS:], minimal=found.can_go == 0, can_go=found.can_go,
            runs=messages.runs, seconds=time.monotonic() - started,
        )  # fmt: skip


def _pair(messages: Messages, named: Named, against: int | None, notes: list[str]) -> tuple[int, int]:
    """The predicted token and the one that it is compared with.

    Raises:
        InputError: that one is the predicted token, or the model does not predict it at all.
    """
    best, second = messages.logits.topk(2).indices.tolist()
    if against is None or (named.is_base and against == best):
        if against is not None:
            notes.append(f"{named.name} predicts the other token itself; it is compared with its runner-up")
        return best, second
    text = repr(named.tokenizer.decode([against]))
    likely = ", ".join(repr(named.tokenizer.decode([index])) for index in messages.logits.topk(5).indices.tolist())
    if against == best:
        raise InputError(f"against {text}: is the predicted token itself", hint=f"likely ones: {likely}")
    probability = messages.log_p[against].exp().item()
    if probability < LEAST_PROBABILITY and not named.is_base:
        raise InputError(
            f"against {text}: the model does not predict it here (probability {probability:.2g})",
            hint=f"likely ones: {likely}",
        )
    return best, against


def _measure(messages: Messages, sets: list[Tensor], pair: tuple[int, int], closed: float) -> list[Measured]:
    logits = messages.run(sets)
    kl = messages.divergence(logits).clamp(min=0).tolist()
    probabilities = logits.softmax(-1)[:, pair[0]].tolist()
    differences = (logits[:, pair[0]] - logits[:, pair[1]]).tolist()
    best = logits.argmax(-1).tolist()
    return [
        Measured(
            size=len(chosen), kl=kl[i], share=1 - kl[i] / closed, difference=differences[i],
            probability=probabilities[i], same=best[i] == pair[0],
        )
        for i, chosen in enumerate(sets)
    ]  # fmt: skip


def _random(drawn: list[Measured]) -> RandomSets:
    kl, share = [m.kl for m in drawn], [m.share for m in drawn]
    return RandomSets(
        draws=len(drawn), kl=sum(kl) / len(kl), kl_low=min(kl), kl_high=max(kl), share=sum(share) / len(share),
        share_low=min(share), share_high=max(share),
    )  # fmt: skip


def _described(messages: Messages, tokenizer: Any, kept: Tensor, effects: Tensor, exact: bool) -> list[Message]:
    weights = messages.weights[tuple(messages.candidates[kept].t())].tolist()
    rows = messages.candidates[kept].tolist()
    moved = top_shifts(messages, kept, SHIFTS)
    return [
        Message(
            layer=layer, head=head, query=query, key=key, weight=weight, effect=effect, exact=exact,
            raises=_shifts(tokenizer, up), lowers=_shifts(tokenizer, down),
        )
        for (layer, head, query, key), weight, effect, (up, down) in zip(
            rows, weights, effects.tolist(), moved, strict=True
        )
    ]  # fmt: skip


def _shifts(tokenizer: Any, moved: list[tuple[int, float]]) -> list[Shift]:
    return [Shift(**_token(tokenizer, index).model_dump(), logit=round(logit, 4)) for index, logit in moved]


def _token(tokenizer: Any, index: int) -> Token:
    return Token(id=index, text=tokenizer.decode([index]))


def _candidate(messages: Messages, tokenizer: Any, index: int) -> Candidate:
    return Candidate(**_token(tokenizer, index).model_dump(), probability=messages.log_p[index].exp().item())
