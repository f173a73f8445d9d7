"""What the processes of one run have to agree on, as torchrun and `accelerate launch` start them.

Every function is the identity in one process; in several, all of them have to call it. Process 0 writes and talks.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from attnprune.errors import AttnPruneError, InputError, first_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

RUN_ID = "attnprune"  # of what `launch` starts
_BACKENDS = ("gloo", "nccl", "tcpstore")


def rank() -> int:
    """The number of this process."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """The number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def here() -> int:
    """The number of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(count())))


def share(batch: int) -> int:
    """This process's part of a batch."""
    return batch // count()


def is_first() -> bool:
    """Whether this process writes files and talks."""
    return rank() == 0


def tells(error: BaseException) -> bool:
    """Whether this process is the one to say an error: what all of them meet (signals, too) is said once, and before
    they have met once per machine."""
    if getattr(error, "everywhere", not isinstance(error, Exception)):
        return is_first()
    return joined() or os.environ.get("LOCAL_RANK", "0") == "0"


def launched() -> bool:
    """Whether `launch` has started this process."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID


def launch(number: int, arguments: list[str]) -> int:
    """Run the command line `attnprune ARGUMENTS` in several processes of this machine, by torch's own launcher.

    Returns:
        The exit code of the process that ended badly first; 0 if none did. (torchrun itself makes 1 of all codes.)

    Raises:
        InputError: fewer than one, or torchrun has started several already.
    """
    if number < 1:
        raise InputError(f"--processes: {number} is less than 1")
    if count() > 1:
        raise InputError("--processes: torchrun has started several already", hint="leave out one of the two")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a process has said what failed
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=number, run_id=RUN_ID, max_restarts=0, monitor_interval=0.1,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "attnprune", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


def join(device: str) -> None:
    """Meet the other processes, and take this one's GPU.

    Raises:
        InputError: there are more processes on this machine than GPUs, or accelerate is told to shard the model.
        AttnPruneError: the others do not answer.
    """
    if count() == 1:
        return
    import torch
    from accelerate import PartialState

    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise InputError(f"accelerate's {engine} is not used", hint="leave it out of its config; see --fsdp")
    gpus = torch.cuda.device_count()
    if device == "cuda" and here() > gpus:
        raise InputError(f"{here()} processes on a machine with {gpus} GPUs", hint=f"torchrun --nproc-per-node {gpus}")
    with _answered():
        PartialState(cpu=device == "cpu")  # sets cuda:LOCAL_RANK and chooses nccl or gloo, as Trainer will


def joined() -> bool:
    """Whether there are several processes and they have met."""
    distributed = sys.modules.get("torch.distributed")  # importing it here could be cut short by a signal
    return count() > 1 and distributed is not None and distributed.is_initialized()


def gather(item: T) -> list[T]:
    """Everybody's picklable item, by process."""
    if count() == 1:
        return [item]
    import torch

    found: list[Any] = [None] * count()
    with _answered():
        torch.distributed.all_gather_object(found, item)
    return found


def from_first(item: T) -> T:
    """Process 0's picklable item; the others' is ignored."""
    return gather(item if is_first() else None)[0]  # pyright: ignore[reportReturnType]


def wait() -> None:
    """Until every process is here."""
    gather(None)


def gather_tensor(tensor: Tensor) -> Tensor:
    """Everybody's tensor (1-D [N], of one length), by process: [processes, N]."""
    if count() == 1:
        return tensor[None]
    import torch

    found = tensor.new_empty(count() * len(tensor))
    with _answered():
        torch.distributed.all_gather_into_tensor(found, tensor)
    return found.view(count(), -1)


def add(tensor: Tensor) -> Tensor:
    """Element-wise sum over the processes, in place. Sums of one value and zeros are exact."""
    if count() > 1:
        import torch

        with _answered():
            torch.distributed.all_reduce(tensor)
    return tensor


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Make every process's tensors those of process 0, in place."""
    if count() > 1:
        import torch

        with _answered():
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)


@contextmanager
def together() -> Iterator[None]:
    """What fails in one process inside the block fails in all of them, with the first one's error; they leave together.

    The block must hold nothing that waits for the others.
    """
    if not joined():
        yield
        return
    mine: AttnPruneError | None = None
    try:
        yield
    except AttnPruneError as error:
        mine = error
    failed = [found for found in gather(mine and (type(mine), mine.message, mine.hint)) if found is not None]
    if failed:
        kind, message, hint = failed[0]
        raise kind(message, hint).of_all() from mine


def first_then_all(make: Callable[[], T]) -> T:
    """What `make` gives: process 0 makes it before the others, who find what it has left on the disk."""
    made: list[T] = []
    for turn in (is_first(), not is_first()):
        with together():
            if turn:
                made.append(make())
    return made[0]


def unanswered(error: BaseException) -> AttnPruneError | None:
    """What gloo and NCCL raise where another process has ended, or does not answer, as one line; None for others."""
    if not joined() or not isinstance(error, RuntimeError):
        return None
    import torch

    if not (isinstance(error, torch.distributed.DistError) or any(name in str(error).lower() for name in _BACKENDS)):
        return None
    line = first_line(error).rsplit("] ", 1)[-1]  # behind the place in gloo's code
    return AttnPruneError(f"another process has ended or does not answer: {line}").of_all()


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise unanswered(error) or error from error
