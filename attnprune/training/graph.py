"""The micro-step as a CUDA graph, and the trial that a faster way of running it must pass before it is used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnprune.errors import AttnPruneError, first_line_with_type
from attnprune.runs.config import TrainConfig
from attnprune.training.compiled import CompiledLayers
from attnprune.training.step import MicroStep

log = logging.getLogger(__name__)

Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(ids, labels, coefficients, seed) -> stats, see `MicroStep`."""

# Compiled layers round elsewhere, and an edge at its threshold then opens or closes; a graph replays the same kernels.
_COMPILED_TOLERANCE = {torch.bfloat16: 0.15, None: 1e-2}  # by autocast
_GRAPH_TOLERANCE = 1e-3
_WARM_UP = 3  # micro-steps before the recording: they compile, and fill every cache


class Trace(NamedTuple):
    """What one micro-step did: its stats and the gradients it added."""

    stats: Tensor
    gradients: list[Tensor]

    def differs(self, other: Trace, tolerance: float) -> str | None:
        """How this one differs from `other`, beyond a relative tolerance; None if it does not."""
        if not torch.allclose(self.stats, other.stats, rtol=tolerance, atol=tolerance * 1e-2):
            return f"stats {_numbers(self.stats)}, not {_numbers(other.stats)}"
        ours, theirs = (torch.nn.utils.get_total_norm(trace.gradients) for trace in (self, other))
        if not bool((ours - theirs).abs() <= tolerance / 5 * theirs):  # their direction may differ more than their size
            return f"the gradients' norm is {float(ours):.4g}, not {float(theirs):.4g}"
        apart = torch.nn.utils.get_total_norm([a - b for a, b in zip(self.gradients, other.gradients, strict=True)])
        if not bool(apart <= tolerance * theirs):
            return f"gradients differ by {float(apart):.2g} of {float(ours):.2g}"
        return None


class RecordedStep:
    """A micro-step recorded once and replayed: nothing is launched one by one, and the host is free meanwhile.

    The gradients keep their memory, since every replay adds to the same addresses. All batches have one shape: Trainer
    drops the rest of an epoch.

    Args:
        step: the micro-step.
        trained: the parameters that it gives gradients.
        inputs: of the first call; they are copied.
        record: (function of nothing) -> replay function; for tests without CUDA.
    """

    def __init__(
        self, step: Step, trained: list[nn.Parameter], inputs: tuple[Tensor | None, ...],
        record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]],
    ):  # fmt: skip
        self._step, self._trained = step, trained
        self._inputs = tuple(None if value is None else value.clone() for value in inputs)
        self._gradients = [torch.zeros_like(parameter) for parameter in trained]
        with _gradients_aside(trained):
            self._attach()
            self._replay = record(lambda: self._step(*self._inputs))  # pyright: ignore[reportArgumentType]

    def __call__(self, ids: Tensor, labels: Tensor, coefficients: Tensor, seed: Tensor | None = None) -> Tensor:
        if self._trained[0].grad is not self._gradients[0]:  # the start of a step: Trainer has dropped them
            torch._foreach_zero_(self._gradients)
            self._attach()
        for static, value in zip(self._inputs, (ids, labels, coefficients, seed), strict=True):
            if static is not None and value is not None:
                if static.shape != value.shape:
                    raise ValueError(f"recorded for {tuple(static.shape)}, not {tuple(value.shape)}")
                static.copy_(value, non_blocking=True)
        return self._replay().clone()  # the next replay writes over it

    def _attach(self) -> None:
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def _gradients_aside(parameters: list[nn.Parameter]) -> Iterator[None]:
    """No gradients at the start of the block, and those that were there at its end."""
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient


def record_cuda(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record `function` as a CUDA graph; calling the result replays it and returns the same tensor every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP - 1):
            function()
        with _no_waits():  # found here: a recording that is broken off leaves the process in a state of its own
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@contextmanager
def _no_waits() -> Iterator[None]:
    """Make every wait for the device an error inside the block."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def fastest(
    step: MicroStep, trained: list[nn.Parameter], inputs: tuple[Tensor | None, ...], settings: TrainConfig,
    record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] = record_cuda,
) -> Step:  # fmt: skip
    """The fastest way to run `step` that does the same on `inputs`, the first batch of a run.

    A way that was left to `auto` and fails or differs is left out with a warning.

    Raises:
        AttnPruneError: one that was asked for fails or differs.
    """
    ways = _Trial(trained, inputs)
    if _wants(settings.compile, trained[0].device, step, settings):

        def compiled() -> Step:
            step.layers = CompiledLayers(*{step.core, step.base.model})
            return step

        if ways.passed("compile", settings.compile, step, compiled, _COMPILED_TOLERANCE[step.amp]) is None:
            step.layers = None
    if _wants(settings.cuda_graph, trained[0].device, step, settings):

        def recorded() -> Step:
            return RecordedStep(step, trained, inputs, record)

        return ways.passed("cuda_graph", settings.cuda_graph, step, recorded, _GRAPH_TOLERANCE) or step
    return step


class _Trial(NamedTuple):
    """What a faster way is tried on."""

    trained: list[nn.Parameter]
    inputs: tuple[Tensor | None, ...]

    def passed(self, name: str, setting: str, step: Step, make: Callable[[], Step], tolerance: float) -> Step | None:
        """The way that `make` makes of `step`, if it does the same; None, with a warning, if `auto` leaves it out."""
        wanted = trace(step, self.trained, self.inputs)
        try:
            made = make()
            problem = trace(made, self.trained, self.inputs).differs(wanted, tolerance)
            if problem is None:
                return made
        except Exception as error:  # whatever the compiler raises; a wait for the device inside the step, or memory
            problem = first_line_with_type(error)
        if setting == "on":
            raise AttnPruneError(f"train.{name}: {problem}")
        log.warning("train.%s is left out: %s", name, problem)
        return None


def _wants(setting: str, device: torch.device, step: MicroStep, settings: TrainConfig) -> bool:
    """Whether a way is to be tried: asked for, or left to `auto` on a GPU that runs the fast step."""
    possible = device.type == "cuda" and step.head is not None and not settings.gradient_checkpointing
    return setting == "on" or (setting == "auto" and possible)


def trace(step: Step, trained: list[nn.Parameter], inputs: tuple[Tensor | None, ...]) -> Trace:
    """Run one micro-step and take its gradients back out."""
    with _gradients_aside(trained):
        stats = step(*inputs)  # pyright: ignore[reportArgumentType]
        gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).to("cpu", copy=True) for p in trained]
    return Trace(stats.to("cpu", copy=True), gradients)


def _numbers(stats: Any) -> str:
    return ", ".join(f"{value:.4g}" for value in stats.tolist())
