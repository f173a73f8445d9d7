"""What this machine has: free memory, the peak memory of a computation, and whether it multiplies bfloat16 fast."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from attnprune.runs import processes

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}
WORTH_IT = 1.3  # bfloat16 has to be this much faster, or rounding is paid for nothing
_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number where there is no limit


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate; None where the system does not tell.

    CUDA: what is free on the device, and what the allocator holds without using it. Else the memory that Linux calls
    available, within the limits of the control groups that this process is in, shared with the run's other processes
    on this machine. `root` is where /proc and /sys lie.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return max(0, min([available, *_group_rooms(root)])) // processes.here()


def _group_rooms(root: Path) -> Iterator[int]:
    """What each limited control group above this process leaves; the cache of files counts as free."""
    try:
        entries = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for _, controllers, path in entries:
        if controllers == "":
            top, names = mounts, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = mounts / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        # Inside a container the path may be the host's, and only the mounted top is there.
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield from _room(folder, *names)


def _room(folder: Path, limit_file: str, usage_file: str, cache: str) -> Iterator[int]:
    try:
        limit, usage = ((folder / name).read_text().strip() for name in (limit_file, usage_file))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return
    if limit != "max" and int(limit) < _UNLIMITED:
        yield int(limit) - int(usage) + int(statistics.get(cache, 0))


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds on the device now; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return _resident("VmRSS")
    except OSError:
        return 0


class PeakMemory:
    """Peak memory of this process above what it held when this was made; None where it cannot be measured.

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
            Path("/proc/self/clear_refs").write_text("5")
            return _resident("VmRSS")
        except (OSError, AttributeError):  # another system
            return None


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Memory that one run needs above what is held before it; None where it cannot be measured."""
    memory = PeakMemory(device)
    run()
    return memory.peak()


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def bfloat16_flags(root: Path = Path("/")) -> set[str]:
    """The processor's instructions for bfloat16 matrices, as Linux names them."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return BFLOAT16_FLAGS & set(flags)


def bfloat16_gain(rows: int, inner: int, columns: int) -> float:
    """How many times faster [rows, inner] @ [inner, columns] is in bfloat16, with the casts that autocast adds.

    The best of three runs each, in turn.
    """
    left, right = torch.ones(rows, inner), torch.ones(columns, inner)
    best = [float("inf"), float("inf")]
    for _ in range(4):  # the first pays for warm-up
        for which, dtype in enumerate((torch.float32, torch.bfloat16)):
            start = time.perf_counter()
            torch.nn.functional.linear(left.to(dtype), right.to(dtype))
            best[which] = min(best[which], time.perf_counter() - start)
    return best[0] / best[1]
