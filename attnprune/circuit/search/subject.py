"""What is searched: one model on one task, and where what was measured is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from attnprune.circuit.model.adapters import Anatomy
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.outside import Outside
from attnprune.circuit.search.splits import Settings, Split, Watch
from attnprune.circuit.tasks import Task
from attnprune.circuit.worth import ABLATIONS

_LEARNING_BATCH = 16


@dataclass(frozen=True)
class Subject:
    """One model on one task.

    Attributes:
        key: what its results are called in the cache.
        gap: what a circuit should change the metric by; None: what the model itself does.
    """

    anatomy: Anatomy
    task: Task
    key: str
    settings: Settings
    watch: Watch
    cache: Cache
    gap: float | None = None

    def told(self, what: str, done: int, total: int) -> None:
        """Say what is going on, with the subject's name in front."""
        self.watch(f"{self.key}: {what}", done, total)

    def learning_split(self) -> Split:
        """The prompts that masks are learned on, all that there are, few in a run: the next step has others."""
        few = replace(self.settings, batch_size=min(_LEARNING_BATCH, self.settings.batch_size))
        return replace(self, settings=few).split("more" if self.task.more else "train", name="more")

    def split(
        self, part: str, *, to_rank: bool = False, by_template: bool = False, name: str = "", ablate: str | None = None
    ) -> Split:
        """A part of the task: "train", "validation", "test" or "more"; `name` in the cache, if it is not the part's."""
        outside = self._outsides[ablate or self.settings.ablate]
        key = f"{self.key} {name or part}" + ("" if outside.kind == "corrupt" else f" {outside.kind}")
        return Split(
            self.anatomy, getattr(self.task, part), key, self.cache, self.settings.batch_size, to_rank=to_rank,
            by_template=by_template, outside=outside, gap=self.gap,
        )  # fmt: skip

    @cached_property
    def _outsides(self) -> dict[str, Outside]:
        how = (self.task.train, self.key, self.cache, self.settings.batch_size)
        return {kind: Outside(self.anatomy, kind, *how) for kind in ABLATIONS}
