"""Gated attention as a Hugging Face attention implementation: registration, `attach`, `detach` and their guards.

transformers looks up the attention function and the mask function by one name in two registries; with only the first
registered a model silently becomes bidirectional, so both are registered here. Some families accept the name and never
call the function, so support is an allow-list plus a run-time probe, not "it did not raise".

Long because the registered functions, the gates and their guards share the state of a model that is being attached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from attnprune.attention.chunked import GatedOutput, GateSettings, OnChunk
from attnprune.attention.dispatch import gated_attention
from attnprune.attention.dropout import restore, switch_off
from attnprune.attention.gates import mix_seed
from attnprune.attention.reference import gated_attention_reference
from attnprune.attention.spans import KnownMask
from attnprune.errors import InputError, SelfCheckError, UnsupportedModelError, shown

NAME = "attnprune"
GATE_ATTRIBUTE = "attnprune_gate"

# Checked against eager with padding, packing, caches and save/load in tests/attention/test_families.py.
SUPPORTED_FAMILIES = frozenset(
    [
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "olmo3",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "stablelm",
        "starcoder2",
    ]
)

# Largest difference of open gates to eager, relative to the largest logit (or to 1, if that is smaller).
PROBE_TOLERANCE = 1e-4
HALF_PROBE_TOLERANCE = 5e-2  # eager rounds its scores to 16 bits, we do not
QUANTISED_PROBE_TOLERANCE = 1e-1  # layers in 8 bits round their inputs too, and double small differences on the way

UNPACK = "model, tokenizer = attnprune.load(path)"  # for whoever gives both where one is changed
SAVING = ("save_pretrained", "push_to_hub")
_CLOSED = -1e30  # the bias of a closed head: beyond any score, and finite as a bias has to be

_discovered: ContextVar[list[tuple[nn.Module, int]] | None] = ContextVar("attnprune_discovered", default=None)


class Gate(nn.Module):
    """The gates of one attention layer: a bias per head and what the last forward counted.

    Attributes:
        bias: [H] fp32, added to each score to give the gate logit. It stays fp32 when the model is cast to 16 bits.
        layer: index of the layer.
        forced_open: every gate open (the dense model; also the open-gate control), but for those of closed heads.
        closed: heads without an open gate, whatever their bias and `forced_open` say.
        temperature, slope_temperature: T_p of the penalty and T_s of the straight-through slope.
        straight_through: whether gradients have that slope, which only training wants; None follows `training`. Without
            it they are the derivatives of what the model computes.
        return_pattern: set while the model is called with `output_attentions=True`; some families do not pass it on.
        noise_seed: None for the `threshold` estimator; for `gumbel` the seed of this micro-step, an int or (for a graph
            that outlives the step) an int64 tensor [] on the model's device.
        deterministic: the kernels' backward pass without atomics.
        on_chunk: statistics hook, see `GateSettings`.
        mask: what the caller knows of the mask of every call until it is None again; see `KnownMask`.
        last: `GatedOutput` counts of the last forward: penalty [H] with gradient, open_edges [H], visible_edges.
    """

    layer_index: Tensor

    def __init__(self, heads: int, bias: float = 0.0, layer: int = 0):
        super().__init__()
        self.bias = nn.Parameter(torch.full((heads,), float(bias), dtype=torch.float32))
        self.layer, self.heads = layer, heads
        self.register_buffer("layer_index", torch.tensor(layer), persistent=False)
        self.forced_open = False
        self.closed: frozenset[int] = frozenset()
        self.temperature = 1.0
        self.slope_temperature = 1.0
        self.straight_through: bool | None = None
        self.noise_seed: int | Tensor | None = None
        self.deterministic = True
        self.on_chunk: OnChunk | None = None
        self.last: GatedOutput | None = None
        self.return_pattern = False
        self.mask: KnownMask | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}  # it may hold a graph, which cannot be copied

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        """Follow the model to another device, but never to a 16-bit dtype: the gates sit on thresholds."""

        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep_precision, recurse)

    def _layer_seed(self, seed: int | Tensor) -> int | Tensor:
        """This layer's own seed. As a tensor it takes the layer from one too: one graph then serves all layers."""
        return mix_seed(seed, self.layer if isinstance(seed, int) else self.layer_index)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_pattern: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Gated attention. Shapes as in `gated_attention`; the pattern [B, H, Q, K] is computed only on request."""
        if self._is_plain(softcap, sinks, return_pattern):
            self.last = None
            return dense_attention(query, key, value, scaling, is_causal=True), None
        bias = self.applied_bias()
        use_noise = self.noise_seed is not None and self.training and not self.forced_open
        has_slope = self.training if self.straight_through is None else self.straight_through
        has_slope = has_slope or self.forced_open  # it is 0 there, and 0 x infinity is not
        settings = GateSettings(
            temperature=self.temperature,
            slope_temperature=self.slope_temperature if has_slope else math.inf,
            noise_seed=self._layer_seed(self.noise_seed) if use_noise and self.noise_seed is not None else None,
            on_chunk=self.on_chunk,
            deterministic=self.deterministic,
            mask=self.mask,
        )
        options = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
        result = gated_attention(query, key, value, bias, visible, settings=settings, **options)
        self.last = result._replace(output=result.output.new_empty(0))
        pattern = None
        if return_pattern:
            wide = (query.to(bias.dtype), key.to(bias.dtype), value.to(bias.dtype))
            slope = settings.slope_temperature
            pattern = gated_attention_reference(*wide, bias, visible, slope_temperature=slope, **options)[1]
            pattern = pattern.to(query.dtype)
        return result.output, pattern

    def applied_bias(self) -> Tensor:
        """[H], the bias that decides now: infinite where forced open, beyond any score in closed heads."""
        bias = torch.full_like(self.bias, float("inf")) if self.forced_open else self.bias
        if self.closed:
            bias = bias.index_fill(0, torch.tensor(sorted(self.closed), device=bias.device), _CLOSED)
        return bias

    def _is_plain(self, softcap: float | None, sinks: Tensor | None, return_pattern: bool) -> bool:
        """Whether the open gates of a known mask are causal attention as every library has it; nothing is counted."""
        known_causal = self.mask is not None and self.mask.is_causal
        special = softcap is not None or sinks is not None or return_pattern or self.on_chunk is not None
        return self.forced_open and known_causal and not special and not self.closed


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **mask: Any) -> Tensor:
    """Attention without gates [B, H, Q, D]; `mask` is an `attn_mask` or `is_causal`, as in PyTorch."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings are wider
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=grouped, **mask)


def allowed_difference(logits: Tensor, model: Any) -> float:
    """How far logits of the same function may be from these where it is computed in another way, by the model's dtype
    and whether its layers are quantised."""
    half = model.dtype in (torch.float16, torch.bfloat16)
    share = HALF_PROBE_TOLERANCE if half else PROBE_TOLERANCE
    if getattr(model, "is_quantized", False):
        share = QUANTISED_PROBE_TOLERANCE
    return share * max(1.0, logits.abs().max().item())


def _visible(mask: Tensor | None, batch: int, pairs: tuple[int, int]) -> Tensor:
    """The bool mask [B, 1, Q, K] of visible pairs, from our mask function or a caller's own 4D mask."""
    if mask is None:
        raise UnsupportedModelError("attnprune attention got no mask: the model does not build it through transformers")
    if mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or tuple(mask.shape[2:]) != pairs:
        expected = f"[{batch}, 1, {pairs[0]}, {pairs[1]}]"
        raise UnsupportedModelError(f"attention_mask: expected shape {expected}, got {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if not mask.is_floating_point() or not bool((visible | (mask <= -1e4)).all()):  # counts, an additive bias (ALiBi)
        raise UnsupportedModelError(
            "attention_mask: a 4D mask is bool (True: visible) or a float of 0 and the lowest number"
        )
    return visible


def attnprune_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: query [B, H, Q, D], key/value [B, H_kv, K, D] -> (output [B, Q, H, D], pattern)."""
    for refused in ("cache", "position_bias"):
        if kwargs.get(refused) is not None:
            raise UnsupportedModelError(f"attnprune attention does not support {refused!r} (paged or biased attention)")
    if dropout:
        raise UnsupportedModelError("attnprune attention has no dropout: it was set after the gates were attached")
    gate = getattr(module, GATE_ATTRIBUTE, None)
    if gate is None:
        gate = _discovery_gate(module, query)
    output, pattern = gate(
        query,
        key,
        value,
        _visible(attention_mask, query.shape[0], (query.shape[2], key.shape[2])),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=s_aux,
        return_pattern=gate.return_pattern or bool(kwargs.get("output_attentions")),
    )
    return output.transpose(1, 2).contiguous(), pattern


def _discovery_gate(module: nn.Module, query: Tensor) -> Gate:
    """An open gate for `_discover`, which notes the module; outside of it a model without gates is an error."""
    found = _discovered.get()
    if found is None:
        raise UnsupportedModelError(
            "attn_implementation='attnprune' without gates", hint="call attnprune.attach(model) or attnprune.load(path)"
        )
    found.append((module, query.shape[1]))
    gate = Gate(query.shape[1]).to(query.device)
    gate.forced_open = True
    return gate


def attnprune_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' bool mask, always built: the shortcut `None` would leave causality to the attention function."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(NAME, attnprune_attention)
AttentionMaskInterface.register(NAME, attnprune_mask)


def gates_of(model: nn.Module) -> list[Gate]:
    """The gates of an attached model in layer order (empty if it has none)."""
    return sorted((m for m in model.modules() if isinstance(m, Gate)), key=lambda gate: gate.layer)


def _guard(module: Any, args: Any) -> None:
    if module.config._attn_implementation != NAME:
        raise RuntimeError(
            f"the attention implementation was switched to {module.config._attn_implementation!r}, which would run "
            "this model dense without a word; call attnprune.detach(model) if that is what you want"
        )


def check_family(config: Any) -> None:
    """Refuse a model by its config: unknown family, encoder-decoder, bidirectional, already gated."""
    family = config.model_type
    if family.startswith("attnprune_"):
        raise UnsupportedModelError(f"{family}: already sparsified")
    other = ("is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention")
    if any(getattr(config, key, False) for key in other) or getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError(f"{family}: only causal decoders are supported")
    if family not in SUPPORTED_FAMILIES:
        known = ", ".join(sorted(SUPPORTED_FAMILIES))
        raise UnsupportedModelError(f"{family}: this model family is not supported", hint=f"supported: {known}")


def _probe_inputs(config: Any, device: torch.device) -> dict[str, Tensor]:
    """Two rows of tokens, the second right-padded, so the probe sees the mask function as well.

    Padding on the left would leave rows without any visible key, where fp64 eager attention is NaN.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(12, getattr(config, "max_position_embeddings", 12))
    ids = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -(length // 3) :] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _discover(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """Run eager and open-gated attention on the same tokens; return the attention modules called, in order."""
    config = model.config
    inputs = _probe_inputs(config, device_of(model))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model.set_attn_implementation("eager")
            eager = model(**inputs, use_cache=False).logits
            model.set_attn_implementation(NAME)
            token = _discovered.set(found := [])
            try:
                ours = model(**inputs, use_cache=False).logits
            finally:
                _discovered.reset(token)
    finally:
        model.train(was_training)
    layers = config.num_hidden_layers
    if len(found) != layers or len({id(module) for module, _ in found}) != layers:
        raise SelfCheckError(f"{config.model_type}: gated attention ran {len(found)} times for {layers} layers")
    real = inputs["attention_mask"].bool()
    if not bool(eager[real].isfinite().all()):
        raise InputError(f"{config.model_type}: the model's own logits are not finite")
    difference = (ours - eager)[real].abs().max().item()
    allowed = allowed_difference(eager[real], model)
    if not difference <= allowed:
        raise SelfCheckError(
            f"{config.model_type}: open gates differ from eager attention by {difference:.2g} (allowed {allowed:.2g})"
        )
    return found


def attach(model: PreTrainedModel, bias: float | Tensor = 0.0) -> list[Gate]:
    """Put a `Gate` on every attention layer of `model` and route its attention through attnprune.

    Gated attention has no dropout: the model's own attention dropout is set to 0, with a warning, until `detach`.

    Args:
        model: a causal LM of a supported family; changed in place.
        bias: initial gate bias for all heads, or a tensor [layers, heads].

    Returns:
        The gates in layer order.

    Raises:
        UnsupportedModelError: the family is not on the allow-list.
        InputError: no transformers model; a bias of another shape, or not finite; a model whose own logits are not.
        SelfCheckError: open gates do not reproduce eager attention; the model is left as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"attach: {type(model).__name__} is not a transformers model", hint=UNPACK)
    if gates_of(model):
        raise UnsupportedModelError("this model already has gates", hint="call attnprune.detach(model) first")
    check_family(model.config)
    if any(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "hf_device_map"):
        raise UnsupportedModelError("attach: parts of this model are not in memory, and nothing says where they are")
    bias = _checked_bias(bias, model.config)
    previous = model.config._attn_implementation or "sdpa"
    try:
        found = _discover(model)
    except BaseException:
        model.set_attn_implementation(previous)
        raise
    for layer, (module, heads) in enumerate(found):
        gate = Gate(heads, layer=layer).to(device_of(module))
        with torch.no_grad():
            gate.bias.copy_(bias[layer] if bias.ndim else bias)
        gate.train(module.training)
        gate.__dict__["_guard_handle"] = module.register_forward_pre_hook(_guard)
        module.add_module(GATE_ATTRIBUTE, gate)
    for part in _savable(model):
        part.__dict__.update(dict.fromkeys(SAVING, refuse_to_save))
    handles = (
        model.register_forward_pre_hook(_before_forward, with_kwargs=True),
        model.register_forward_hook(_after_forward, always_call=True),
    )
    model.__dict__["_attnprune"] = (previous, handles)
    model.__dict__["_attnprune_dropout"] = switch_off(model.config, [module for module, _ in found])
    return gates_of(model)


def device_of(module: nn.Module) -> torch.device:
    """Where a model takes its inputs, or a part of it computes, also where accelerate has put parts elsewhere."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    place = next((place for place in places if place is not None), None)
    if place is not None:
        return torch.device(place)
    return next(parameter.device for parameter in module.parameters())


def _savable(model: nn.Module) -> list[nn.Module]:
    """The model and the parts of it (its backbone) that have a `save_pretrained` of their own."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """What an attached model has for the names in SAVING: the stock class would read those files without the gates.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        "save_pretrained: a stock model's files cannot hold gates and would come back dense",
        hint="write a merged model: attnprune apply SIDECAR --merge OUT",
    )


def _checked_bias(bias: Any, config: Any) -> Tensor:
    """The first biases, a number or [layers, heads], as a tensor.

    Raises:
        InputError: of another shape or kind, or not finite.
    """
    try:
        bias = torch.as_tensor(bias, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"bias: {shown(bias)} is neither a number nor a tensor [layers, heads]") from None
    expected = (config.num_hidden_layers, config.num_attention_heads)
    if bias.ndim and tuple(bias.shape) != expected:
        raise InputError(f"bias: expected one number or shape {expected}, got {tuple(bias.shape)}")
    if not bool(bias.isfinite().all()):
        raise InputError("bias: is not finite")  # NaN compares False: every gate would close without a word
    return bias


def _before_forward(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    for gate in gates_of(model):
        gate.return_pattern = bool(kwargs.get("output_attentions"))


def _after_forward(model: nn.Module, args: Any, output: Any) -> None:
    for gate in gates_of(model):
        gate.return_pattern = False


def detach(model: nn.Module) -> None:
    """Undo `attach`: remove gates and guards, restore the previous attention implementation and attention dropout.

    `model` may be a wrapper of the attached model (PEFT). One without gates is left alone.

    Raises:
        UnsupportedModelError: it is a part of the attached model.
        InputError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"detach: {type(model).__name__} is not a model", hint=UNPACK)
    attached = next((module for module in model.modules() if "_attnprune" in module.__dict__), None)
    if attached is None:
        if gates_of(model):
            raise UnsupportedModelError("these gates were attached to a larger model", hint="call detach on that one")
        return
    previous, handles = attached.__dict__.pop("_attnprune")
    restore(attached.__dict__.pop("_attnprune_dropout"))
    for handle in handles:
        handle.remove()
    for part in _savable(attached):
        for name in SAVING:
            part.__dict__.pop(name, None)
    for module in list(model.modules()):
        gate = getattr(module, GATE_ATTRIBUTE, None)
        if isinstance(gate, Gate):
            gate.__dict__["_guard_handle"].remove()
            delattr(module, GATE_ATTRIBUTE)
    cast(PreTrainedModel, attached).set_attn_implementation(previous)


@contextmanager
def gates_forced_open(model: nn.Module) -> Iterator[None]:
    """Run the model dense (every gate open, but for heads that were closed) inside the block."""
    with _every_gate(model, "forced_open", True):
        yield


@contextmanager
def heads_forced_open(gate: Gate, heads: slice | int = slice(None)) -> Iterator[None]:
    """Run with these heads of one layer open, and all other gates as they are, inside the block."""
    before = gate.bias.detach().clone()
    try:
        with torch.no_grad():
            gate.bias[heads] = math.inf
        yield
    finally:
        with torch.no_grad():
            gate.bias.copy_(before)


@contextmanager
def straight_through(model: nn.Module, use: bool = True) -> Iterator[None]:
    """Give gradients the gates' training slope inside the block, or not, whatever mode the model is in."""
    with _every_gate(model, "straight_through", use):
        yield


@contextmanager
def _every_gate(model: nn.Module, attribute: str, value: Any) -> Iterator[None]:
    """Set an attribute of all gates inside the block."""
    gates = gates_of(model)
    before = [getattr(gate, attribute) for gate in gates]
    for gate in gates:
        setattr(gate, attribute, value)
    try:
        yield
    finally:
        for gate, state in zip(gates, before, strict=True):
            setattr(gate, attribute, state)
