"""What the kernels compute per score: the gate, its noise and its slopes, on tiles in registers.

Scores enter in units of log2(e), so that one `exp2` gives e^z: x = s * log2(e) without the bias, y = e^z with it. Both
sigmoids come from y without a logarithm (u uniform, logit(u) logistic noise):

    z + logit(u) > 0  <=>  u y > 1 - u       sigma(z) = y / (1 + y)       sigma(z + logit(u)) = u y / (1 - u + u y)
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1e30)  # the score of a pair that is not visible
LARGEST = tl.constexpr(40.0)  # log2 of the largest y: sigma is 1 to fp32 from there on, and products of two stay finite


@triton.jit
def hash32(x):
    """The mixer of `attnprune.attention.gates`, on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_state(seed, head, queries):
    """The part of the noise counter that a row shares: uint32, shape of `queries`. `head` counts batch x heads.

    Of the int64 `seed` the low 32 bits count.
    """
    head_state = hash32(head.to(tl.uint32) + seed.to(tl.uint32))
    return hash32(head_state + queries.to(tl.uint32) * 0x9E3779B1)


@triton.jit
def uniform(state, keys):
    """The uniforms of `attention.gates.logistic_noise`, bit for bit; `state` and `keys` broadcast to the tile."""
    bits = hash32(state + keys.to(tl.uint32) * 0x85EBCA77) >> 9
    # 23 bits as the mantissa of a number in [1, 2), less 1 - 2^-24: exact mid-points without an integer conversion.
    return (bits | 0x3F800000).to(tl.float32, bitcast=True) - (1.0 - 1.0 / 16777216)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x; FAST is the hardware's approximation (1 ulp), which the interpreter does not have."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def odds(z):
    """e^z for z in log2 units, held finite."""
    return tl.exp2(tl.minimum(z, LARGEST))


@triton.jit
def penalty(y, z, inv_temperature, SHARP: tl.constexpr, FAST: tl.constexpr):
    """Smooth count of one edge, sigma(z / T), with y = e^z.

    Where 1 / T is SHARP, 1 or 2, the odds of z / T are a product; SHARP 0 takes any T from z.
    """
    if SHARP == 2:
        y = y * y
    if SHARP == 0:
        y = odds(z * inv_temperature)
    return y * reciprocal(1.0 + y, FAST)


@triton.jit
def sigmoid_slope(opens, closes, z, inv_temperature, SHARP: tl.constexpr, FAST: tl.constexpr):
    """sigma'(z / T) / T, with e^z = opens / closes; SHARP as for the penalty."""
    if SHARP == 2:
        opens, closes = opens * opens, closes * closes
    if SHARP == 0:
        opens, closes = odds(z * inv_temperature), 1.0
    r = reciprocal(opens + closes, FAST)
    slope = (opens * r) * (closes * r)
    if SHARP != 1:
        slope = slope * inv_temperature
    return slope


@triton.jit
def score_gradient(
    s, scale, bias, lse, delta, value_gradient, pressure, visible, state, keys, inv_temperature,
    inv_slope_temperature, MASK: tl.constexpr, NOISE: tl.constexpr, SHARP_P: tl.constexpr, SHARP_S: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """(P * A, dS, gate part of dS) of a tile of scores s, with P the softmax over all visible keys and A the gate.

    dS = P (A g - Delta) + P g slope + pressure * penalty slope, g = dO.v, Delta = dO.O (FlashAttention's trick); the
    last two terms are the gate part, whose sum is the gradient of the head's bias.
    """
    z = s * scale + bias
    if MASK:
        s = tl.where(visible, s, HIDDEN)
        z = tl.where(visible, z, HIDDEN)
    p = tl.exp2(s * scale - lse)
    y = odds(z)
    through = p * value_gradient
    opens, closes = y, 1.0
    noisy = z
    if NOISE:
        u = uniform(state, keys)
        opens, closes = u * y, 1.0 - u
        is_open = opens > closes
        if SHARP_S == 0:
            noisy = z + tl.log2(u) - tl.log2(closes)
    else:
        is_open = z > 0.0
    slope = sigmoid_slope(opens, closes, noisy, inv_slope_temperature, SHARP_S, FAST)
    if NOISE or SHARP_P != SHARP_S or SHARP_P == 0:
        gate = through * slope + pressure * sigmoid_slope(y, 1.0, z, inv_temperature, SHARP_P, FAST)
    else:
        gate = (through + pressure) * slope
    gradient = tl.where(is_open, through, 0.0) - p * delta + gate
    return tl.where(is_open, p, 0.0), gradient, gate
