"""What a machine says of itself, read from trees of files as Linux has them."""

from __future__ import annotations

import pytest
import torch

from attnprune.training import machine

CPU = torch.device("cpu")
MIB = 2**20


def tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9999999 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n"}
V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": "5\n",
    "sys/fs/cgroup/a/b/memory.stat": "inactive_file 0\n",
    "sys/fs/cgroup/a/memory.max": f"{1024 * MIB}\n",
    "sys/fs/cgroup/a/memory.current": f"{400 * MIB}\n",
    "sys/fs/cgroup/a/memory.stat": f"anon 7\ninactive_file {100 * MIB}\n",
}
V1 = {
    "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/on/the/host\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2048 * MIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{48 * MIB}\n",
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
}
UNLIMITED = {**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}


@pytest.mark.parametrize(("groups", "expected"), [({}, 8192), (V2, 724), (V1, 2000), (UNLIMITED, 8192)])
def test_free_memory_is_what_the_system_and_the_groups_leave(tmp_path, groups, expected):
    assert machine.free_memory(CPU, tree(tmp_path, MEMINFO | groups)) == expected * MIB


def test_a_system_that_does_not_tell(tmp_path):
    assert machine.free_memory(CPU, tmp_path) is None
    assert machine.bfloat16_flags(tmp_path) == set()


def test_the_instructions_of_a_processor(tmp_path):
    tree(tmp_path, {"proc/cpuinfo": "processor : 0\nflags\t\t: fpu avx512f amx_bf16 amx_tile avx512_bf16x\n"})
    assert machine.bfloat16_flags(tmp_path) == {"amx_bf16"}


def test_the_peak_of_a_computation():
    peak = machine.peak_bytes(lambda: torch.ones(64 * MIB // 4) + 1, CPU)
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 0.9 * 128 * MIB < peak < 1.5 * 128 * MIB


def test_the_gain_is_a_ratio_of_times(monkeypatch):
    """A clock that gives every multiplication in fp32 four ticks and in bf16 two."""
    now = [0.0]
    linear = torch.nn.functional.linear

    def slow(left, right):
        now[0] += 4.0 if left.dtype == torch.float32 else 2.0
        return linear(left, right)

    monkeypatch.setattr(torch.nn.functional, "linear", slow)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    assert machine.bfloat16_gain(4, 3, 2) == 2.0
