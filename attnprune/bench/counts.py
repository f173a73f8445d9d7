"""What a step asks of the host and the device: operators, waits, launches, kernels, matrix products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnprune.bench import clock

# Operators whose result the host needs before it goes on.
_READS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim", "_unique2"}
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")


class Product(NamedTuple):
    """A matrix product [m, k] @ [k, n]."""

    m: int
    k: int
    n: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


class Operators(TorchDispatchMode):
    """Counts what is dispatched inside the block: all operators, waits for `device`, and the layers' matrix products.

    A wait is an operator whose result the host needs, or a copy to the host. On a CPU nothing waits; there what would
    wait on a GPU is counted. With `paused` no waits are counted: PyTorch's optimisers keep step counts on the host.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.paused = False
        self.operators, self.waits = 0, 0
        self.products: Counter[Product] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions run compiled."""
        return True

    def __enter__(self):
        self._lists = _counted_lists(self) if self.device.type == "cpu" else nullcontext()
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *problem: Any):
        super().__exit__(*problem)
        self._lists.__exit__(*problem)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.operators += 1
        self.waits += self._waits(name, made, args, kwargs or {})
        if name in ("mm", "addmm"):
            left, right = args[-2:] if name == "mm" else args[1:3]
            self.products[Product(left.shape[0], left.shape[1], right.shape[1], left.dtype)] += 1
        return made

    def _waits(self, name: str, made: Any, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        there = [value for value in args if isinstance(value, Tensor) and value.device.type == self.device.type]
        if self.paused or not there:
            return False
        if name in ("_to_copy", "copy_"):
            fetched = self.device.type != "cpu" and isinstance(made, Tensor) and made.device.type == "cpu"
            return fetched and not options.get("non_blocking", False)
        return name in _READS


@contextmanager
def _counted_lists(counted: Operators) -> Iterator[None]:
    """Count `Tensor.tolist` as a wait: on a CPU it dispatches nothing."""
    own = torch.Tensor.tolist

    def tolist(tensor: Tensor) -> list[Any]:
        counted.waits += not counted.paused
        return own(tensor)

    torch.Tensor.tolist = tolist  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.Tensor.tolist = own


class Kernels:
    """Counts what CUDA ran between `start` and `stop`: kernels, and the host's launches of kernels and graphs."""

    def __init__(self) -> None:
        activities = torch.profiler.ProfilerActivity
        self._profile = torch.profiler.profile(activities=[activities.CPU, activities.CUDA])
        self.kernels = self.launches = 0

    def start(self) -> None:
        self._profile.start()

    def stop(self) -> None:
        torch.cuda.synchronize()
        self._profile.stop()
        events = self._profile.events() or []
        on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        self.kernels = sum(not event.name.startswith("Mem") for event in on_device)
        self.launches = sum(event.name.startswith(_LAUNCHES) for event in events)


class MatmulBound:
    """The time that matrix products alone take on a device, each shape measured once."""

    def __init__(self, device: torch.device, repeats: int = 5):
        self.device, self.repeats = device, repeats
        self._taken: dict[Product, float] = {}

    def milliseconds(self, products: Counter[Product]) -> float:
        """The sum over all of them."""
        for product in products.keys() - self._taken.keys():
            self._taken[product] = self._measure(product)
        return sum(count * self._taken[product] for product, count in products.items())

    def _measure(self, product: Product) -> float:
        options: dict[str, Any] = {"dtype": product.dtype, "device": self.device}
        left, right = torch.randn(product.m, product.k, **options), torch.randn(product.k, product.n, **options)
        run: dict[str, clock.Run] = {"matmul": lambda: torch.mm(left, right)}
        return clock.time_together(run, self.repeats, self.device)["matmul"].median_ms
