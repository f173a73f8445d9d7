"""Where a sparse model lost something: how far each layer's and head's attention is from the base's, and how much KL
comes back with that put right.

Put right in two ways, one layer or head at a time: its attention output is replaced by the base's on the same text
(activation patching), or its gates are opened. The second says less than it seems: weights that were trained with
closed gates rely on them, and opening some then costs. So the first ranks.

Both models run the same attention, the base with every gate open, so that a sparse model whose only loss is one layer
has a KL of exactly 0 in both ways. Errors are taken in the residual stream: values and output projection train
together, and a basis that they alone share is no error. All layers are measured, and of the heads those that promise
most: what a layer wins back is shared among its heads by their squared errors, and the largest shares are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attnprune.attention.interface import Gate, attach, gates_forced_open, gates_of, heads_forced_open
from attnprune.data.blocks import Blocks
from attnprune.measure import BATCH_TOKENS, kl_divergence, token_losses
from attnprune.sidecar.damage import Damage, LayerDamage, fingerprints
from attnprune.sidecar.folder import Sidecar
from attnprune.training.compiled import decoder_layers
from attnprune.training.evaluation import held_out_split, load_pair, tell_unknown, text_blocks
from attnprune.training.scope import attention_modules

TOKENS = 4096  # each costs two passes through half the model per layer and measured head
HEADS = 16  # measured
DIGITS = 6  # of a stored number
NO_NORM = 1e-30  # in place of a base whose output is 0


def sidecar_damage(
    sidecar: Sidecar,
    source: str | None,
    *,
    base: str | None = None,
    device: str = "cpu",
    seq_len: int = 0,
    tokens: int = TOKENS,
    heads: int = HEADS,
    text_field: str = "text",
    on_note: Callable[[str], None] = lambda line: None,
) -> Damage:
    """The damage of a sidecar on a text, or on (a part of) the run's own held-out split.

    Raises:
        InputError: unknown text or base, or no `source` and a held-out split that cannot be rebuilt.
    """
    dense, sparse = load_pair(sidecar, base, device)
    length = seq_len or sidecar.manifest.result.seq_len
    if source is None:
        blocks = held_out_split(sidecar, dense)
    else:
        blocks = text_blocks(source, text_field, dense, length, tokens)
    tell_unknown([blocks], on_note)
    blocks = some_of(blocks, tokens)
    return measure_damage(sparse, dense.model, blocks, fingerprints(sidecar), heads=heads, on_note=on_note)


def some_of(blocks: Blocks, tokens: int) -> Blocks:
    """Blocks of at most so many tokens (but at least one), evenly spread."""
    count = min(len(blocks), max(1, tokens // blocks.seq_len))
    return blocks.take(torch.linspace(0, len(blocks) - 1, count).long())


@torch.no_grad()
def measure_damage(
    sparse: Any,
    base: Any,
    blocks: Blocks,
    files: dict[str, str],
    *,
    heads: int = HEADS,
    on_note: Callable[[str], None] = lambda line: None,
) -> Damage:
    """Compare a gated model with its base, layer by layer.

    Args:
        sparse: a causal LM with gates and changed weights, in eval mode.
        base: the base, without gates; it gets open ones.
        files: sha256 of the sidecar's files, for the record.
        heads: how many heads are measured, the most promising ones; all if there are no more.
        on_note: receives a line about the progress now and then.
    """
    attach(base)
    ours, theirs = _sites(sparse, blocks.input_ids[:1]), _sites(base, blocks.input_ids[:1])
    sums = _Sums([len(site.gate.bias) for site in ours])
    with gates_forced_open(base):
        for done, (ids, labels) in _batches(blocks, ours):
            on_note(f"layers: {done:,} of {blocks.input_ids.numel():,} tokens")
            _compare(sparse, base, ours, theirs, ids, labels, sums)
        chosen = sorted(sums.promising(heads))
        for done, (ids, labels) in _batches(blocks, ours) if chosen else ():
            on_note(f"{len(chosen)} heads: {done:,} of {blocks.input_ids.numel():,} tokens")
            with _watched(theirs) as wanted:
                expected, _ = token_losses(base(input_ids=ids, use_cache=False).logits, labels)
            with _watched(ours) as seen:
                sparse(input_ids=ids, use_cache=False)
            run = _Rerun(sparse, ours, seen, ids, labels)
            for layer, head in chosen:
                own, right = (_parts(s[layer], w[layer].mixed)[head] for s, w in ((ours, seen), (theirs, wanted)))
                patched, _ = run.patched(layer, seen[layer].output + (right - own).to(own.dtype))
                opened, _ = run.opened(layer, head)
                sums.add_head(layer, head, *(kl_divergence(expected, log_p) for log_p in (patched, opened)))
    return sums.record(blocks, files)


class _Site(NamedTuple):
    """One layer of a model: the decoder layer, its gates, and what its heads' outputs go through."""

    layer: nn.Module
    gate: Gate
    projection: nn.Module


def _sites(model: Any, ids: Tensor) -> list[_Site]:
    """The layers of a gated model; the output projection is the linear map that runs last in an attention."""
    last: dict[int, nn.Module] = {}

    def saw(index: int, module: nn.Module, args: Any, output: Any) -> None:
        last[index] = module

    with ExitStack() as hooks:
        for index, attention in enumerate(attention_modules(model)):
            for child in attention.children():
                if isinstance(child, (nn.Linear, Conv1D)):
                    hooks.enter_context(_removed(child.register_forward_hook(partial(saw, index))))
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    layers, gates = decoder_layers(model), gates_of(model)
    return [_Site(layer, gate, last[i]) for i, (layer, gate) in enumerate(zip(layers, gates, strict=True))]


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


class _Seen:
    """Hooks that keep what passes one layer, and put `fed` in place of the hidden states that it reads."""

    entered: Tensor  # hidden states [B, T, D]
    returned: Any  # what the layer hands on
    mixed: Tensor  # the heads' outputs side by side [B, T, H * width]
    output: Tensor  # the attention's [B, T, D]

    def __init__(self, site: _Site, fed: Tensor | None):
        self.fed = fed
        self.handles = [
            site.layer.register_forward_pre_hook(self._enter),
            site.layer.register_forward_hook(self._leave),
            site.projection.register_forward_hook(self._project),
        ]

    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.entered = args[0]
        return None if self.fed is None else (self.fed, *args[1:])

    def _leave(self, layer: nn.Module, args: Any, returned: Any) -> None:
        self.returned = returned

    def _project(self, projection: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.mixed, self.output = args[0], output


@contextmanager
def _watched(sites: list[_Site], fed: list[Tensor] | None = None) -> Iterator[list[_Seen]]:
    """Keep what passes every layer inside the block."""
    seen = [_Seen(site, None if fed is None else fed[index]) for index, site in enumerate(sites)]
    try:
        yield seen
    finally:
        for one in seen:
            for handle in one.handles:
                handle.remove()


def _batches(blocks: Blocks, sites: list[_Site]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """(tokens done before, (ids, labels)) of about BATCH_TOKENS tokens each."""
    rows, device = max(1, BATCH_TOKENS // blocks.seq_len), sites[0].gate.bias.device
    for first in range(0, len(blocks), rows):
        batch = blocks.input_ids[first : first + rows], blocks.labels[first : first + rows]
        yield first * blocks.seq_len, (batch[0].to(device), batch[1].to(device))


def _compare(
    sparse: Any, base: Any, ours: list[_Site], theirs: list[_Site], ids: Tensor, labels: Tensor, sums: _Sums
) -> None:
    """One batch: both errors of every layer and head, and every layer put right alone."""
    with _watched(theirs) as wanted:
        expected, base_losses = token_losses(base(input_ids=ids, use_cache=False).logits, labels)
    with _watched(ours, fed=[one.entered for one in wanted]) as taught:
        sparse.base_model(input_ids=ids, use_cache=False)
    with _watched(ours) as seen:
        log_p, losses = token_losses(sparse(input_ids=ids, use_cache=False).logits, labels)
    sums.add(base_losses, losses, kl_divergence(expected, log_p))
    run = _Rerun(sparse, ours, seen, ids, labels)
    for index, (site, other) in enumerate(zip(ours, theirs, strict=True)):
        truth = [wanted[index].output.float(), *_parts(other, wanted[index].mixed)]
        for name, found in (("teacher", taught[index]), ("student", seen[index])):
            for place, (part, right) in enumerate(
                zip((found.output.float(), *_parts(site, found.mixed)), truth, strict=True)
            ):
                sums.add_error(name, index, place, part, right)
        patched, _ = run.patched(index, wanted[index].output)
        opened, losses = run.opened(index, slice(None))
        sums.add_layer(index, losses, *(kl_divergence(expected, log_p) for log_p in (patched, opened)))


def _parts(site: _Site, mixed: Tensor) -> list[Tensor]:
    """What each head adds to the attention's output, [B, T, D] in fp32 (a bias of the projection is no head's)."""
    weight: Tensor = site.projection.weight.float()  # pyright: ignore[reportAssignmentType, reportCallIssue]
    weight = weight if isinstance(site.projection, Conv1D) else weight.T
    count = len(site.gate.bias)
    return [rows @ part for rows, part in zip(mixed.float().chunk(count, -1), weight.chunk(count), strict=True)]


@dataclass
class _Rerun:
    """A batch that goes through the model again with one layer changed.

    Nothing changes below that layer, so the layers there hand on what they handed on before.
    """

    model: Any
    sites: list[_Site]
    seen: list[_Seen]
    ids: Tensor
    labels: Tensor

    def patched(self, layer: int, output: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities, losses) of the counted predictions with this attention output in one layer."""
        with _removed(self.sites[layer].projection.register_forward_hook(partial(_return, output))):
            return self._from(layer)

    def opened(self, layer: int, heads: slice | int) -> tuple[Tensor, Tensor]:
        """The same with these heads of one layer open."""
        with heads_forced_open(self.sites[layer].gate, heads):
            return self._from(layer)

    def _from(self, layer: int) -> tuple[Tensor, Tensor]:
        skipped = [site.layer for site in self.sites[:layer]]
        for below, one in zip(skipped, self.seen, strict=False):
            below.forward = partial(_return, one.returned)
        try:
            return token_losses(self.model(input_ids=self.ids, use_cache=False).logits, self.labels)
        finally:
            for below in skipped:
                del below.forward


def _return(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


@dataclass
class _Layer:
    """Sums of one layer: over tokens of KL and loss, and squares [1 + heads, 2] of error and of the base's output."""

    squares: dict[str, Tensor]
    head_patched: list[float | None]
    head_opened: list[float | None]
    patched: float = 0.0
    opened: float = 0.0
    loss: float = 0.0


class _Sums:
    """What adds up over the batches, in fp64."""

    def __init__(self, heads: list[int]):
        def squares(count: int) -> dict[str, Tensor]:
            return {name: torch.zeros(1 + count, 2, dtype=torch.float64) for name in ("teacher", "student")}

        self.layers = [_Layer(squares(count), [None] * count, [None] * count) for count in heads]
        self.tokens = 0
        self.loss = self.base_loss = self.kl = 0.0

    def add(self, base_losses: Tensor, losses: Tensor, kl: Tensor) -> None:
        self.tokens += len(losses)
        self.base_loss += base_losses.double().sum().item()
        self.loss += losses.double().sum().item()
        self.kl += kl.double().sum().item()

    def add_error(self, name: str, layer: int, place: int, found: Tensor, right: Tensor) -> None:
        """`place` 0 is the layer, 1 + h its head h."""
        parts = torch.stack([(found - right).double().square().sum(), right.double().square().sum()])
        self.layers[layer].squares[name][place] += parts.cpu()

    def add_layer(self, layer: int, losses: Tensor, patched: Tensor, opened: Tensor) -> None:
        """KL with the layer patched, and KL and losses with it opened."""
        self.layers[layer].loss += losses.double().sum().item()
        self.layers[layer].patched += patched.double().sum().item()
        self.layers[layer].opened += opened.double().sum().item()

    def add_head(self, layer: int, head: int, patched: Tensor, opened: Tensor) -> None:
        for sums, kl in ((self.layers[layer].head_patched, patched), (self.layers[layer].head_opened, opened)):
            sums[head] = (sums[head] or 0.0) + kl.double().sum().item()

    def promising(self, count: int) -> list[tuple[int, int]]:
        """The heads (layer, head) with the largest shares of what their layers win back."""
        shares: list[tuple[float, int, int]] = []
        for index, layer in enumerate(self.layers):
            errors = layer.squares["student"][1:, 0]
            won = (self.kl - layer.patched) * errors / errors.sum().clamp(min=NO_NORM)
            shares += [(-share, index, head) for head, share in enumerate(won.tolist())]
        return [(layer, head) for _, layer, head in sorted(shares)[:count]]

    def record(self, blocks: Blocks, files: dict[str, str]) -> Damage:
        def mean(total: float) -> float:
            return _short(total / self.tokens)

        def means(totals: list[float | None]) -> list[float | None]:
            return [None if total is None else mean(total) for total in totals]

        def errors(squares: Tensor) -> list[float]:
            return [_short(share) for share in (squares[:, 0] / squares[:, 1].clamp(min=NO_NORM)).tolist()]

        layers = []
        for layer in self.layers:
            (teacher, *teachers), (student, *students) = (errors(layer.squares[n]) for n in ("teacher", "student"))
            layers.append(
                LayerDamage(
                    teacher_error=teacher, student_error=student, kl_patched=mean(layer.patched),
                    kl_open=mean(layer.opened), loss_open=mean(layer.loss), head_teacher_error=teachers,
                    head_student_error=students, head_kl_patched=means(layer.head_patched),
                    head_kl_open=means(layer.head_opened),
                )
            )  # fmt: skip
        return Damage(
            created_by=f"attnprune {metadata.version('attnprune')}", files=files, data=blocks.name,
            data_sha256=blocks.fingerprint, seq_len=blocks.seq_len, tokens=self.tokens,
            loss=mean(self.loss), base_loss=mean(self.base_loss), kl=mean(self.kl), layers=layers,
        )  # fmt: skip


def _short(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")
