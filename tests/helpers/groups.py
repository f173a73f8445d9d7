"""Several processes of one run without torchrun: forked, so that none of them has to import torch again."""

from __future__ import annotations

import multiprocessing
import os
import socket

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

FORK = multiprocessing.get_context("fork")


def in_group(target, *args, size: int = 2, timeout: float = 200) -> list[int]:
    """Call `target(*args)` in each of `size` processes; their exit codes (negative: killed by that signal)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = [FORK.Process(target=_member, args=(rank, size, port, target, args)) for rank in range(size)]
    for member in members:
        member.start()
    try:
        for member in members:
            member.join(timeout)
            assert member.exitcode is not None, "a process hangs"
    finally:
        for member in members:
            member.kill()
    return [member.exitcode for member in members]


def _member(rank: int, size: int, port: int, target, args) -> None:
    for state in (AcceleratorState, GradientState, PartialState):  # of the parent's own runs
        state._reset_state()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    target(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
