"""Measuring a model on token blocks: loss, KL to the base, density, edges per query, and what the gates look like.

Definitions (formats/attnprune-v1.md): density is open edges over visible (query, key) pairs, pooled over all heads of
all layers, with the run-time rule; loss is token-mean cross-entropy in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from attnprune.attention.chunked import GatedOutput
from attnprune.attention.interface import device_of, gates_forced_open, gates_of
from attnprune.attention.interventions import Recorder, recording
from attnprune.data.blocks import IGNORED_LABEL, Blocks
from attnprune.late import Shown
from attnprune.runs import processes
from attnprune.units import percent

_SUMS = ("loss", "base", "control", "kl", "agree", "exact", "tokens")  # of the batches, in `measure`
BATCH_TOKENS = 1024  # bounds the logits in memory: two models x tokens x vocabulary

Reference = Callable[[Tensor], Tensor]
"""Token ids [B, T] -> logits [B, T, V] of the base model."""


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """What was measured on one set of blocks.

    Attributes:
        loss, base_loss, control_loss: nats per token of the sparse model, of the base, and of the sparse model's
            weights with every gate open (None if not measured).
        kl: KL(base || sparse), nats per token.
        density: open / visible edges; edges_per_query: mean open edges of one query in one head.
        open_edges, visible_edges: the counts behind density, summed over layers, heads and blocks.
        exact_match: share of blocks whose counted predictions are all right (argmax); None where all predictions count,
            as in plain text.
        agreement: share of tokens on which base and sparse model have the same argmax.
        seq_len, tokens, data: block length, counted predictions, name of the text.
        heads: open edges per visible edge, [layers][heads].
    """

    loss: float
    density: float | None = None
    edges_per_query: float | None = None
    open_edges: int = 0
    visible_edges: int = 0
    base_loss: float | None = None
    control_loss: float | None = None
    kl: float | None = None
    agreement: float | None = None
    exact_match: float | None = None
    seq_len: int = 0
    tokens: int = 0
    data: str = ""
    heads: list[list[float]] = field(default_factory=list)

    def __repr__(self) -> str:
        parts = [f"loss {self.loss:.4f}"]
        if self.base_loss is not None:
            parts.append(f"loss - base {self.loss_gap:+.4f}")
        if self.kl is not None:
            parts.append(f"KL {self.kl:.4f}")
        if self.density is not None:
            parts.append(f"{percent(self.density)} of the edges open at T = {self.seq_len}")
        return f"Report({self.data}: {', '.join(parts)})"

    @property
    def loss_gap(self) -> float:
        """loss - base loss, nats per token."""
        return self.loss - (self.base_loss if self.base_loss is not None else float("nan"))


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities [N, V] of the counted predictions, their cross-entropies [N]) for next-token prediction."""
    predictions, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].reshape(-1)
    counted = targets != IGNORED_LABEL
    if not bool(counted.all()):  # picking rows copies them, forward and backward
        predictions, targets = predictions[counted], targets[counted]
    log_probabilities = functional.log_softmax(predictions.float(), -1)
    return log_probabilities, -log_probabilities.gather(-1, targets[:, None]).squeeze(-1)


def kl_divergence(base: Tensor, sparse: Tensor) -> Tensor:
    """KL(base || sparse) [N] from log-probabilities [N, V]."""
    return functional.kl_div(sparse, base, log_target=True, reduction="none").sum(-1)


@torch.no_grad()
def mean_loss(reference: Reference, blocks: Blocks, device: torch.device) -> float:
    """Token-mean cross-entropy of the base on `blocks`, nats."""
    parts = [
        token_losses(reference(ids.to(device)), labels.to(device))[1]
        for ids, labels in zip(
            *(t.split(max(1, BATCH_TOKENS // blocks.seq_len)) for t in (blocks.input_ids, blocks.labels)), strict=True
        )
    ]
    return torch.cat(parts).double().mean().item()


@torch.no_grad()
def measure(
    model: nn.Module, blocks: Blocks, *, reference: Reference | None = None, control: bool = False, batch_size: int = 0,
    shared: bool = False,
) -> Report:  # fmt: skip
    """Measure `model` on `blocks`; with `reference` also against the base, with `control` also with open gates.

    `batch_size` is in blocks; 0 means about BATCH_TOKENS tokens at a time. `shared`: the processes of a run share the
    batches, and all get the report of one process, to the bit: each batch is a row of its own, and rows are added in
    their order. All run equally many, as a sharded model needs them; what is too much does not count.
    """
    batch_size = batch_size or max(1, BATCH_TOKENS // blocks.seq_len)
    device = device_of(model)
    gates = gates_of(model)
    batches = [blocks.take(part) for part in torch.arange(len(blocks)).split(batch_size)]
    rank, world = (processes.rank(), processes.count()) if shared else (0, 1)
    rows = torch.zeros(len(batches), len(_SUMS), dtype=torch.float64)
    open_edges = [torch.zeros(gate.heads, dtype=torch.int64, device=device) for gate in gates]
    visible = torch.zeros(len(gates), dtype=torch.int64)
    for turn in range(0, len(batches), world):
        number = turn + rank
        batch = batches[min(number, len(batches) - 1)]
        sums, counts = _batch(model, batch.input_ids.to(device), batch.labels.to(device), reference, control)
        if number < len(batches):
            rows[number] = torch.tensor(sums, dtype=torch.float64)
            for layer, counted in enumerate(counts):
                open_edges[layer] += counted.open_edges.to(device)
                visible[layer] += int(counted.visible_edges)
    if shared:
        rows, visible = (processes.add(counts.to(device)).cpu() for counts in (rows, visible))
        open_edges = [processes.add(counts) for counts in open_edges]
    sums = {name: sum(column) for name, column in zip(_SUMS, rows.T.tolist(), strict=True)}
    tokens = sums["tokens"]
    total_open = int(sum(int(count.sum()) for count in open_edges))
    total_visible = sum(pairs * gate.heads for pairs, gate in zip(visible.tolist(), gates, strict=True))
    query_heads = len(blocks) * blocks.seq_len * sum(gate.heads for gate in gates)
    return Report(
        loss=sums["loss"] / tokens,
        density=total_open / total_visible if gates else None,
        edges_per_query=total_open / query_heads if gates else None,
        open_edges=total_open,
        visible_edges=total_visible,
        base_loss=sums["base"] / tokens if reference else None,
        control_loss=sums["control"] / tokens if control else None,
        kl=sums["kl"] / tokens if reference else None,
        agreement=sums["agree"] / tokens if reference else None,
        exact_match=sums["exact"] / len(blocks) if bool((blocks.labels == IGNORED_LABEL).any()) else None,
        seq_len=blocks.seq_len,
        tokens=int(tokens),
        data=blocks.name,
        heads=[(count / pairs).tolist() for count, pairs in zip(open_edges, visible.tolist(), strict=True)],
    )


def _batch(
    model: Any, ids: Tensor, labels: Tensor, reference: Reference | None, control: bool
) -> tuple[list[float], list[GatedOutput]]:
    """(the `_SUMS` of one batch [B, T], what each gate counted)."""
    log_p, losses = token_losses(model(input_ids=ids, use_cache=False).logits, labels)
    counts: list[Any] = [gate.last for gate in gates_of(model)]
    base = open_loss = kl = agree = 0.0
    if reference is not None:
        base_log_p, base_losses = token_losses(reference(ids), labels)
        base = base_losses.double().sum().item()
        kl = kl_divergence(base_log_p, log_p).double().sum().item()
        agree = (base_log_p.argmax(-1) == log_p.argmax(-1)).sum().item()
    if control:
        with gates_forced_open(model):
            open_loss = token_losses(model(input_ids=ids, use_cache=False).logits, labels)[1].double().sum().item()
    return [losses.double().sum().item(), base, open_loss, kl, agree, _exact(log_p, labels), len(losses)], counts


def _exact(log_probabilities: Tensor, labels: Tensor) -> int:
    """Number of rows whose counted predictions are all right."""
    counted = labels[:, 1:] != IGNORED_LABEL
    right = torch.ones_like(counted)
    right[counted] = log_probabilities.argmax(-1) == labels[:, 1:][counted]
    return int(right.all(-1).sum())


@dataclass(frozen=True)
class GateStatistics:
    """What the learned mask looks like on calibration text, per layer.

    density [heads]; open_by_offset [heads, buckets]: open / visible edges by distance query - key, with bucket edges
    `offset_edges` [buckets + 1]; sink [heads]: share of the open edges that point at the first token.
    """

    density: list[Tensor]
    open_by_offset: list[Tensor]
    sink: list[Tensor]
    offset_edges: Tensor


def offset_edges(seq_len: int) -> Tensor:
    """Bucket edges of the distance profile: 0, 1, 2, 4, 8, ... up to `seq_len` (int32)."""
    edges = [0, 1]
    while edges[-1] < seq_len:
        edges.append(min(2 * edges[-1], seq_len))
    return torch.tensor(edges, dtype=torch.int32)


@torch.no_grad()
def gate_statistics(model: nn.Module, blocks: Blocks) -> GateStatistics:
    """Run the blocks through the model and describe its open edges.

    Distances are counted against all causal pairs of the block (a sliding window makes the far buckets empty).
    """
    batch_size = max(1, BATCH_TOKENS // blocks.seq_len)
    gates = gates_of(model)
    device = gates[0].bias.device
    length = blocks.seq_len
    edges = offset_edges(length).to(device)
    by_offset = [torch.zeros(len(gate.bias), length, dtype=torch.int64, device=device) for gate in gates]
    sinks = [torch.zeros_like(gate.bias, dtype=torch.int64) for gate in gates]
    visible = [0] * len(gates)

    def recorder(layer: int) -> Recorder:
        def record(rows: slice, cols: slice, is_open: Tensor) -> None:
            _, head, query, key = is_open.nonzero(as_tuple=True)
            distance = (query + rows.start) - (key + cols.start)
            flat = head * length + distance
            by_offset[layer] += torch.bincount(flat, minlength=by_offset[layer].numel()).view_as(by_offset[layer])
            if cols.start == 0:
                sinks[layer] += is_open[..., 0].sum((0, 2))

        return record

    with recording(gates, [recorder(layer) for layer in range(len(gates))]):
        for first in range(0, len(blocks), batch_size):
            model(input_ids=blocks.input_ids[first : first + batch_size].to(device), use_cache=False)
            for layer, gate in enumerate(gates):
                assert gate.last is not None
                visible[layer] += int(gate.last.visible_edges)
    bucket = torch.bucketize(torch.arange(length, device=device), edges[1:], right=True)
    pairs = torch.zeros(len(edges) - 1, device=device)
    pairs.index_add_(0, bucket, torch.arange(length, 0, -1, device=device, dtype=pairs.dtype) * len(blocks))
    profile = [torch.zeros(len(counts), len(edges) - 1, device=device) for counts in by_offset]
    for layer, counts in enumerate(by_offset):
        profile[layer].index_add_(1, bucket, counts.float())
    totals = [counts.sum(1) for counts in by_offset]
    return GateStatistics(
        density=[(total / pairs_seen).cpu() for total, pairs_seen in zip(totals, visible, strict=True)],
        open_by_offset=[(layer / pairs).cpu() for layer in profile],
        sink=[(sink / total.clamp(min=1)).cpu() for sink, total in zip(sinks, totals, strict=True)],
        offset_edges=edges.cpu(),
    )
