"""Gradients summed over the processes of a run, without DDP: its hooks would run inside of every micro-step, where a
recorded one cannot have them, and its sums depend on the number of processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnprune.runs import processes

BUCKET = 1 << 24  # numbers that are exchanged at once


class SharedGradients:
    """Sums what the micro-steps of all processes have added to the gradients; nothing to do in one process.

    In order, each turn of micro-batches (one from every process) is gathered and added in the order of the processes:
    the sums then have the bits of one process that sees all the micro-batches one by one. That sends a gradient to
    every process in every turn. Otherwise a process sums its own, and the sums are added once per step, in an order of
    the backend's choosing; every process gets the same bits either way.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], in_order: bool):
        self.in_order = in_order
        self._buckets = _buckets(parameters)
        self._sums: list[Tensor] = []
        self._used = torch.zeros(len(parameters))

    def add(self, last: bool) -> None:
        """Call it after each micro-step; after the `last` of a step every gradient is the sum.

        One that no process has stays None.
        """
        if processes.count() == 1 or not (last or self.in_order):
            return
        used = [float(p.grad is not None) for bucket in self._buckets for p in bucket]
        self._used += torch.tensor(used)
        flat = [torch.cat([_gradient(p).flatten() for p in bucket]) for bucket in self._buckets]
        if not self.in_order:
            self._sums = [processes.add(own) for own in flat]
        else:
            for bucket in self._buckets:
                for parameter in bucket:
                    parameter.grad = None
            turns = [processes.gather_tensor(own) for own in flat]
            if not self._sums:
                self._sums = [torch.zeros_like(own) for own in flat]
            for total, turn in zip(self._sums, turns, strict=True):
                for part in turn:
                    total += part
        if last:
            self._hand_over()

    def _hand_over(self) -> None:
        used = iter(processes.add(self._used.to(self._sums[0].device)).tolist())
        for bucket, total in zip(self._buckets, self._sums, strict=True):
            for parameter, part in zip(bucket, total.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter) if next(used) else None
        self._sums = []
        self._used.zero_()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in their order, as many of one data type together as fit a bucket."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        room -= parameter.numel()
        if not buckets or room < 0 or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = BUCKET - parameter.numel()
        buckets[-1].append(parameter)
    return buckets
