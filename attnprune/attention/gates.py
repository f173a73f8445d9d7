"""The gate's mathematics on plain tensors: logit -> open or closed, its slope, its penalty, its noise.

For a gate logit z (score plus head bias) and noise eps the gate is `A = 1[z + eps > 0]`; backwards it has the
straight-through slope `sigma'((z + eps) / T_s) / T_s` (arXiv 2411.06890 with T_s = 1). The penalty counts expected
edges as `sigma(z / T_p)`. The functions work elementwise on any shape and never see a model.
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def gate_open(logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """Which gates are open (bool, shape of `logits`): `z + eps > 0`; without noise this is the run-time rule."""
    return logits > 0 if noise is None else logits + noise > 0


def straight_through_slope(logits: Tensor, noise: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """dA/dz used in the backward pass: `sigma'((z + eps) / T_s) / T_s`, whose integral is 1 for every finite T_s.

    An infinite T_s means the true derivative of a hard gate, 0.
    """
    if math.isinf(temperature):
        return torch.zeros_like(logits)  # by name, since hidden pairs have infinite logits
    return edge_penalty_slope(logits if noise is None else logits + noise, temperature)


def edge_penalty(logits: Tensor, temperature: float) -> Tensor:
    """Smooth count of one edge, `sigma(z / T_p)`. A temperature above 1 lets the penalty reach wide-open gates."""
    return torch.sigmoid(_divided(logits, temperature))


def edge_penalty_slope(logits: Tensor, temperature: float) -> Tensor:
    """d(edge_penalty)/dz."""
    penalty = edge_penalty(logits, temperature)
    return _divided(penalty * (1 - penalty), temperature)


def _divided(x: Tensor, temperature: float) -> Tensor:
    """x / temperature without a pass over memory at 1."""
    return x if temperature == 1 else x / temperature


def _product32(x: Any, factor: int) -> Any:
    """The low 32 bits of x * factor, for an int or int64 tensor of values below 2**32.

    In two halves, as the product of two 32-bit numbers does not fit an int64.
    """
    return (((x * (factor >> 16) & 0xFFFF) << 16) + x * (factor & 0xFFFF)) & _MASK32


def _hash32(x: Any) -> Any:
    """A 32-bit integer mixer (two xor-shift-multiply rounds) on an int or int64 tensor of values below 2**32."""
    x = _product32(x ^ (x >> 16), 0x7FEB352D)
    x = _product32(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


@overload
def mix_seed(*parts: int) -> int: ...
@overload
def mix_seed(*parts: int | Tensor) -> int | Tensor: ...
def mix_seed(*parts: int | Tensor) -> int | Tensor:
    """One 32-bit seed from several integers (run seed, step, micro-step, layer, rank).

    Any of them may be an int64 tensor, which makes the seed one, of the same value.
    """
    state: int | Tensor = 0
    for part in parts:
        state = _hash32((_product32(state, 0x9E3779B1) + (part & _MASK32)) & _MASK32)
    return state


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """The seed as the operators take it, int64 []; made on the device, so that nothing waits for a copy."""
    return torch.full((), seed, dtype=torch.int64, device=device) if isinstance(seed, int) else seed


def logistic_noise(seed: int | Tensor, heads: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard logistic noise that depends only on (seed, head, query, key), so every tiling draws the same values.

    `seed` is an int or an int64 tensor []; `heads` [N], `queries` [C] and `keys` [K] are int64 indices below 2**32
    (`heads` counts batch x head). Returns [N, C, K].
    """
    head_state = _hash32((heads + (seed & _MASK32)) & _MASK32)
    row_state = _hash32((head_state[:, None] + _product32(queries, 0x9E3779B1)) & _MASK32)
    bits = _hash_in_place(_int32(row_state)[:, :, None] + _int32(_product32(keys, 0x85EBCA77)))
    uniform = bits.bitwise_right_shift_(9).bitwise_and_(2**23 - 1).to(dtype).add_(0.5).mul_(2.0**-23)
    return uniform.logit_()  # of 23-bit mid-points, exact in fp32 and never 0 or 1


def _int32(x: Tensor) -> Tensor:
    """The low 32 bits as int32, whose products wrap around."""
    return (((x + 2**31) & _MASK32) - 2**31).to(torch.int32)


def _hash_in_place(x: Tensor) -> Tensor:
    """`_hash32` on an int32 tensor, overwriting it: three times faster on a CPU than with int64 and temporaries."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x.bitwise_xor_((x >> shift).bitwise_and_(_MASK32 >> shift)).mul_(factor)
    return x.bitwise_xor_((x >> 16).bitwise_and_(_MASK32 >> 16))
