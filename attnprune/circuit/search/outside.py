"""What the edges outside of a circuit carry: values of the corrupted prompt, of no prompt, or nothing.

Corrupted: the shared beginning of both prompts is the same whatever is patched. Mean and zero ablate it too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnprune.circuit.model.ablation import ablated, rows_in_turn
from attnprune.circuit.model.activations import Activations, collect, collect_pair
from attnprune.circuit.model.adapters import Anatomy
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.tasks import Prompts
from attnprune.circuit.worth import Ablation


class Outside:
    """The ablation of one model. `prompts`, in runs of `batch_size`, are those that `mean` averages over."""

    def __init__(
        self, anatomy: Anatomy, kind: Ablation, prompts: Sequence[Prompts], key: str, cache: Cache, batch_size: int
    ):
        self.kind = kind
        self._anatomy, self._prompts, self._key, self._cache, self._batch_size = (
            anatomy, prompts, key, cache, batch_size
        )  # fmt: skip

    def pair(self, prompts: Prompts) -> tuple[Activations, Activations]:
        """(the clean run, what edges outside carry)."""
        if self.kind == "corrupt":
            return collect_pair(self._anatomy, prompts.clean, prompts.corrupted, 1)
        clean = collect(self._anatomy, prompts.clean, 1)
        if self.kind != "mixed":
            return clean, ablated(self._anatomy, clean, self._outputs(self.kind))
        corrupted = collect(self._anatomy, prompts.corrupted, 1)
        mean, zero = (
            ablated(self._anatomy, clean, outputs) for outputs in (self._outputs("mean"), self._outputs("zero"))
        )
        return clean, rows_in_turn([corrupted, mean, zero])

    def _outputs(self, kind: str) -> Tensor:
        """What every source writes, [U, D]."""
        if kind == "zero":
            return torch.zeros(self._anatomy.graph.sources, self._anatomy.width)
        return self._cache.tensors(f"{self._key} means", self._means)["outputs"]

    def _means(self) -> dict[str, Tensor]:
        """The mean over the clean prompts and all their positions."""
        total, count = torch.zeros(self._anatomy.graph.sources, self._anatomy.width, dtype=torch.double), 0
        for batch in self._prompts:
            for ids in batch.clean.to(self._anatomy.model.device).split(self._batch_size):
                total += collect(self._anatomy, ids, 1).outputs.double().sum((1, 2)).cpu()
                count += ids.numel()
        return {"outputs": (total / count).float()}
