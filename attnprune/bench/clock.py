"""Timing, peak memory and the description of the machine."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from attnprune.bench.record import Machine, Timing

Run = Callable[[], object]
_PROCESS = Path("/proc/self")


def machine(device: torch.device) -> Machine:
    """Device, cores, versions and the commit of the checkout that this package lies in."""
    versions = {"cudnn": str(torch.backends.cudnn.version())} if device.type == "cuda" else {}
    for name in ("attnprune", "torch", "transformers", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        cores=os.cpu_count() or 1, threads=torch.get_num_threads(), versions=versions, commit=_commit(),
    )  # fmt: skip


def _processor() -> str:
    """Name of the processor, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that holds this file, with "-dirty" where the package differs from it.

    None outside of one: an environment inside another project's checkout is not tracked there.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def time_together(runs: dict[str, Run], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Time functions in turn, one run of each per round, so that a disturbance meets all of them alike."""
    flush = torch.empty(64 * 2**20, dtype=torch.int8, device=device) if device.type == "cuda" else None
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm-up
    for _ in range(repeats):
        for name, run in runs.items():
            if flush is not None:
                flush.zero_()  # a cold L2, as between the layers of a model
            times[name].append(_once(run, device))
    return {name: timing_of(taken) for name, taken in times.items()}


def _once(run: Run, device: torch.device) -> float:
    """Milliseconds of one run."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def timing_of(taken: list[float]) -> Timing:
    low, median, high = torch.tensor(taken).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Timing(median_ms=median, low_ms=low, high_ms=high, repeats=len(taken))


class Memory:
    """Memory of this process above what it held when this was made; numbers are None where they cannot be measured.

    CUDA: the allocator's peak. Linux: the peak of the resident memory (VmHWM, reset through /proc/self/clear_refs)
    after freed memory went back to the system, so it includes what PyTorch's libraries allocate, in pages.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._before = self._restarted()

    def restart(self) -> None:
        """Forget the peak so far."""
        self._restarted()

    def peak(self) -> int | None:
        """Bytes of the largest peak since the (re)start above what was held at first."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _resident("VmHWM") - self._before)

    def _restarted(self) -> int | None:
        """Reset the peak; returns what is held."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            (_PROCESS / "clear_refs").write_text("5")
            return _resident("VmRSS")
        except (OSError, AttributeError):  # another system
            return None


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Memory that one run needs above what is held before it; None where it cannot be measured."""
    run()  # what stays allocated after a first run (libraries, caches) is not the run's
    memory = Memory(device)
    run()
    return memory.peak()


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = (_PROCESS / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
