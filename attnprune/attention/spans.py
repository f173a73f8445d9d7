"""Masks as intervals: what the kernels read in place of a [B, Q, K] mask, O(T) instead of O(T^2).

Causal attention with a cache, left or right padding, packed documents and a sliding window have in common that the keys
which a query sees are one interval, and the queries which see a key are one interval too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """A visibility mask as intervals.

    rows: int32 [B, Q, 3]: the first visible key of a query, one past the last, and 1 if its edges count (both tokens
        real; a right-padded query sees real keys, but its edges do not count).
    columns: int32 [B, K, 2]: the first query that sees a key, one past the last.

    A query or key without a partner has the empty interval (0, 0).
    """

    rows: Tensor
    columns: Tensor

    @property
    def visible_edges(self) -> Tensor:
        """The pairs of one head that count, summed over the batch (int64 scalar)."""
        return ((self.rows[..., 1] - self.rows[..., 0]) * self.rows[..., 2]).sum(dtype=torch.int64)


class KnownMask(NamedTuple):
    """A layer's mask where the caller knows it beforehand: then nothing about it is asked of the device.

    spans: its intervals, None if it is not made of them; visible_edges: as `Spans.visible_edges`; is_causal: whether
    it hides later keys and nothing else.
    """

    spans: Spans | None
    visible_edges: Tensor
    is_causal: bool

    @classmethod
    def of(cls, visible: Tensor, batch: int) -> KnownMask:
        """Look at the mask [1, 1, T, T] that `batch` equal rows share. Synchronises with the device."""
        spans = spans_of(visible)
        if spans is not None:
            spans = Spans(*(part.expand(batch, *part.shape[1:]).contiguous() for part in spans))
        is_causal = torch.equal(visible[0, 0], torch.ones_like(visible[0, 0]).tril())
        return cls(spans, visible.sum(dtype=torch.int64) * batch, is_causal)


def spans_of(visible: Tensor, counted: Tensor | None = None) -> Spans | None:
    """The intervals of `visible` (bool [B, 1, Q, K]), or None if it is not made of intervals.

    `counted` (bool like `visible`, default `visible`) may only leave out whole rows. Synchronises with the device once.
    """
    visible = visible[:, 0]
    rows, rows_fit = _intervals(visible)
    columns, columns_fit = _intervals(visible.transpose(1, 2))
    seen = visible.any(-1)
    row_counts = seen if counted is None else counted[:, 0].any(-1)
    fits = rows_fit & columns_fit
    if counted is not None:
        fits = fits & (counted[:, 0] == (visible & row_counts[..., None])).all()
    if not bool(fits):
        return None
    return Spans(torch.cat([rows, row_counts[..., None].int()], -1), columns)


def _intervals(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(int32 [..., 2] first and one past the last true position of the last axis, bool scalar: all true in between)."""
    count = mask.sum(-1, dtype=torch.int32)
    first = mask.int().argmax(-1).int()
    last = mask.shape[-1] - mask.flip(-1).int().argmax(-1).int()
    seen = count > 0
    first, last = torch.where(seen, first, 0), torch.where(seen, last, 0)
    return torch.stack([first, last], -1), (last - first == count).all()
