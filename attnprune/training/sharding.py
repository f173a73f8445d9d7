"""FSDP2: weights, gradients and optimiser states spread over the processes of a run, by torch's own `fully_shard`.

A layer is whole only while it runs. Gates are sharded with their layer and stay fp32: there is no mixed-precision
policy, which would cast them; autocast says what is computed in bf16. The parameters become DTensors; what leaves
training (checkpoints, the best state, the sidecar) is made of whole tensors, which all processes gather together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnprune.errors import AttnPruneError
from attnprune.runs import processes
from attnprune.training.compiled import decoder_layers


def shard(models: Sequence[Any], device: str) -> None:
    """Shard transformers causal LMs in place, layer by layer; every process calls this with the same weights.

    What a backward pass leaves is the sum over the processes of each one's gradients.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device, (processes.count(),))
    for model in models:
        for part in (*decoder_layers(model), model):
            fully_shard(part, mesh=mesh)
            assert isinstance(part, FSDPModule)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo multiplies nothing in passing
        if not all(is_sharded(parameter) for parameter in model.parameters()):
            raise AttnPruneError("fsdp: some weights were not sharded")


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor or parameter is a part of a sharded one."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """The whole tensor, on its device; every process calls this for the same tensors in the same order."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def assign(parameter: Any, value: Tensor) -> None:
    """Give a parameter, sharded or not, the values of process 0's whole tensor."""
    if is_sharded(parameter):
        value = like(parameter, value)
    parameter.copy_(value)


def like(parameter: Any, value: Tensor) -> Tensor:
    """A whole tensor sharded as a parameter is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state dict with whole tensors on the CPU, as one process would have it."""
    state = optimizer.state_dict()
    states = {
        number: {key: whole(value).cpu() if isinstance(value, Tensor) else value for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": states}


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole_state` gave, or the state of a run in one process."""
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        number: {
            key: like(parameters[number], value) if isinstance(value, Tensor) and value.ndim else value
            for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})
