"""Sparse causal LMs written by attnprune (Apache-2.0): this one file, torch and transformers are all they need.

Every layer's attention multiplies its softmax pattern by a gate, `A_ij = 1[score_ij + bias_h > 0]`: the output is
`sum_j P_ij A_ij v_j`, not renormalised, and a row without an open gate outputs 0. Load a folder that contains this file
with `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`.
"""
# pyright: basic, reportCallIssue=false, reportAttributeAccessIssue=false

import warnings

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "attnprune_portable"
CHUNK_ROWS, CHUNK_ELEMENTS = 64, 2**20
GATHER_SHARE = 0.03
PREFIX = "attnprune_"
HIDDEN_SIZES = ("vocab_size", "hidden_size")
# Family -> (causal LM class, path from the model to its list of layers, name of the attention module in a layer).
FAMILIES = {
    "cohere2": ("Cohere2ForCausalLM", "model.layers", "self_attn"),
    "gemma": ("GemmaForCausalLM", "model.layers", "self_attn"),
    "gemma2": ("Gemma2ForCausalLM", "model.layers", "self_attn"),
    "gemma3_text": ("Gemma3ForCausalLM", "model.layers", "self_attn"),
    "gpt2": ("GPT2LMHeadModel", "transformer.h", "attn"),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "transformer.h", "attn"),
    "gpt_neox": ("GPTNeoXForCausalLM", "gpt_neox.layers", "attention"),
    "gpt_oss": ("GptOssForCausalLM", "model.layers", "self_attn"),
    "granite": ("GraniteForCausalLM", "model.layers", "self_attn"),
    "llama": ("LlamaForCausalLM", "model.layers", "self_attn"),
    "mistral": ("MistralForCausalLM", "model.layers", "self_attn"),
    "mixtral": ("MixtralForCausalLM", "model.layers", "self_attn"),
    "olmo": ("OlmoForCausalLM", "model.layers", "self_attn"),
    "olmo2": ("Olmo2ForCausalLM", "model.layers", "self_attn"),
    "olmo3": ("Olmo3ForCausalLM", "model.layers", "self_attn"),
    "opt": ("OPTForCausalLM", "model.decoder.layers", "self_attn"),
    "phi": ("PhiForCausalLM", "model.layers", "self_attn"),
    "phi3": ("Phi3ForCausalLM", "model.layers", "self_attn"),
    "qwen2": ("Qwen2ForCausalLM", "model.layers", "self_attn"),
    "qwen3": ("Qwen3ForCausalLM", "model.layers", "self_attn"),
    "smollm3": ("SmolLM3ForCausalLM", "model.layers", "self_attn"),
    "stablelm": ("StableLmForCausalLM", "model.layers", "self_attn"),
    "starcoder2": ("Starcoder2ForCausalLM", "model.layers", "self_attn"),
}


class Gate(nn.Module):
    """The learned bias of each head, fp32."""

    def __init__(self, heads):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(heads, dtype=torch.float32))

        self.return_pattern = False

    def _apply(self, fn, recurse=True):
        """Follow the model to another device, but never to a 16-bit dtype: the gates sit on thresholds."""

        def keep_precision(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep_precision, recurse)

    def forward(self, query, key, value, visible, scaling, softcap, sinks, return_pattern):
        """Operation for operation what attnprune itself computes, so that no score ends up on the other side of 0."""
        with torch.autocast(query.device.type, enabled=False):
            bias = self.bias.float()
            batch, heads, queries, _ = query.shape
            kv_heads, keys = key.shape[1:3]
            key, value = key.to(bias.dtype), value.to(bias.dtype).contiguous()
            visible = visible.expand(batch, 1, queries, keys)
            row = max(1, heads * keys)
            count = max(1, min(queries, CHUNK_ROWS, CHUNK_ELEMENTS // row))
            together = max(1, CHUNK_ELEMENTS // (row * count))
            output = query.new_empty(batch, heads, queries, value.shape[-1])
            pattern = query.new_zeros(batch, heads, queries, keys) if return_pattern else None
            for first in range(0, batch, together):
                for start in range(0, queries, count):
                    items, rows = slice(first, first + together), slice(start, start + count)
                    seen = visible[items, 0, rows].amax(1).any(0).nonzero()
                    low, high = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, min(1, keys))
                    part = query[items, :, rows].to(bias.dtype) * scaling
                    scores = _fold(part, kv_heads) @ key[items, :, low:high].transpose(-1, -2)
                    scores = scores.view(*part.shape[:3], high - low)
                    if softcap is not None:
                        scores = (scores / softcap).tanh() * softcap
                    scores = scores.masked_fill(~visible[items, :, rows, low:high], float("-inf"))
                    output[items, :, rows] = _attend(scores, value[items], low, bias, sinks).to(query.dtype)
                    if pattern is not None:
                        is_open = scores + bias[:, None, None] > 0
                        pattern[items, :, rows, low:high] = _softmax(scores, sinks) * is_open
            return output, pattern


def _fold(x, kv_heads):
    """[B, H, C, D] -> [B, H_kv, H / H_kv * C, D]: the queries that share a key head, in one matrix."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])


def _attend(scores, value, low, bias, sinks):
    """What the open edges of scores [B, H, R, C] (-inf: hidden) add up to, [B, H, R, D]: only rows that have one."""
    batch, heads, rows, cols = scores.shape
    _, kv_heads, keys, width = value.shape
    flat = scores.view(-1, cols)
    threshold = (-bias)[:, None].expand(batch, heads, rows).reshape(-1)
    live = (~(flat.amax(-1) <= threshold)).nonzero().squeeze(-1)
    if len(live) < len(flat):
        flat, threshold = flat.index_select(0, live), threshold[live]
    weights = torch.softmax(flat, -1)
    if sinks is not None:
        weights = (
            weights * torch.sigmoid(torch.logsumexp(flat, -1) - sinks.to(flat.dtype)[live // rows % heads])[:, None]
        )
    is_open = flat > threshold[:, None]
    count = is_open.sum(-1)
    if count.sum() > GATHER_SHARE * scores.numel():
        weights = weights * is_open
        if len(live) < batch * heads * rows:
            weights = weights.new_zeros(batch * heads * rows, cols).index_copy(0, live, weights)
        output = weights.view(batch, kv_heads, -1, cols) @ value[:, :, low : low + cols]
    else:
        row, col = is_open.nonzero(as_tuple=True)
        first = live // (heads // kv_heads * rows) * keys + low
        edges = first[row] + col
        mixed = nn.functional.embedding_bag(
            edges, value.view(-1, width), count.cumsum(0) - count, mode="sum", per_sample_weights=weights[row, col]
        )
        mixed = mixed.masked_fill((count == 0)[:, None], float("nan"))
        output = mixed.new_zeros(batch * heads * rows, width).index_copy(0, live, mixed)
    return output.view(batch, heads, rows, width)


def _softmax(scores, sinks):
    """Softmax over the keys, with the sink in the denominator; a row without a visible key is 0."""
    pattern = torch.softmax(scores, -1)
    if sinks is not None:
        log_sum = torch.logsumexp(scores, -1)
        pattern = pattern * torch.sigmoid(log_sum - sinks.to(scores.dtype)[None, :, None])[..., None]
    return pattern.masked_fill(scores.amax(-1, keepdim=True).isneginf(), 0.0)


def gated_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, s_aux=None, **kwargs
):
    """query [B, H, Q, D], key and value [B, H_kv, K, D] -> (output [B, Q, H, D], pattern [B, H, Q, K] or None)."""
    if kwargs.get("cache") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("attnprune attention supports neither paged caches nor position biases")
    if dropout:
        warnings.warn("attnprune attention has no dropout: the model's attention dropout is left out", stacklevel=2)
    visible = _visible(attention_mask, query.shape[0], (query.shape[2], key.shape[2]))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    gate = module.attnprune_gate
    pattern_wanted = gate.return_pattern or bool(kwargs.get("output_attentions"))
    output, pattern = gate(query, key, value, visible, scaling, softcap, s_aux, pattern_wanted)
    return output.transpose(1, 2).contiguous(), pattern


def _visible(mask, batch, pairs):
    """The bool mask [B, 1, Q, K] of visible pairs, from our mask function or a caller's own 4D mask."""
    if mask is None:
        raise ValueError("attnprune attention got no mask: the model does not build it through transformers")
    if mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or tuple(mask.shape[2:]) != pairs:
        raise ValueError(f"attention_mask: expected shape [{batch}, 1, {pairs[0]}, {pairs[1]}], got {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if not mask.is_floating_point() or not bool((visible | (mask <= -1e4)).all()):
        raise ValueError("attention_mask: a 4D mask is bool (True: visible) or a float of 0 and the lowest number")
    return visible


def full_mask(*args, **kwargs):
    """transformers' bool mask, always built, so that causality never depends on the attention function."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(ATTENTION, gated_attention)
AttentionMaskInterface.register(ATTENTION, full_mask)


class GatedModel:
    """Mixin over a transformers causal LM: a Gate per attention module, and no way to run it without."""

    _keep_in_fp32_modules_strict = ["attnprune_gate"]  # noqa: RUF012
    _supports_attention_backend = False

    def __init__(self, config, *args, **kwargs):
        _check_attention(getattr(config, "_attn_implementation", None))
        config._attn_implementation = ATTENTION
        super().__init__(config, *args, **kwargs)
        _, layers, name = FAMILIES[config.model_type.removeprefix("attnprune_")]
        for layer in self.get_submodule(layers):
            attention = getattr(layer, name)
            attention.attnprune_gate = Gate(config.num_attention_heads)
            attention.register_forward_pre_hook(_guard)
        self.register_forward_pre_hook(_before_forward, with_kwargs=True)

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        _check_attention(attn_implementation)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        _check_attention(kwargs.pop("attn_implementation", None))
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError("adapter_config.json at the root of a sparse model: its gates do not fit other weights")
        for group in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[group]:
                first = min(str(key) for key in info[group])
                raise ValueError(f"the checkpoint does not fit this model: {first} ({group.replace('_', ' ')})")
        for name, module in model.named_modules():
            own = [(f"{name}.bias", _in_memory(module))] if isinstance(module, Gate) else []
            for key, tensor in own or module.named_parameters(name, recurse=False):
                if not tensor.is_meta and not bool(tensor.isfinite().all()):
                    raise ValueError(f"{key} is not finite")
        return (model, info) if output_loading_info else model


def _in_memory(gate):
    """The bias of a gate, read back where `device_map` has put it on the disk."""
    if gate.bias.device.type != "meta":
        return gate.bias
    from accelerate.utils import align_module_device

    with align_module_device(gate, torch.device("cpu")):
        return gate.bias.detach().clone()


def _check_attention(name):
    if name not in (None, ATTENTION):
        raise ValueError(f"this model runs only with its own attention, not {name!r}")


class GatedConfig:
    """Mixin over a transformers config: no other attention can be asked for, and config.json names ours.

    The name in config.json makes a stock class, which would ignore the gates, refuse the folder. Where a caller names
    another attention the wrong sizes do the same: no tensor of the checkpoint fits.
    """

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        values = dict(config_dict)
        for key in cls._hidden_sizes():
            if PREFIX + key in values:
                values[key] = values.pop(PREFIX + key)
        return super().from_dict(values, **kwargs)

    @classmethod
    def _hidden_sizes(cls):
        """The keys that config.json hides, by the family's own names."""
        return [cls.attribute_map.get(key, key) for key in HIDDEN_SIZES]

    @property
    def _attn_implementation(self):
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value):
        _check_attention(value)
        self._attn_implementation_internal = value

    def to_dict(self):
        values = super().to_dict()
        keys = self._hidden_sizes()
        wrong = dict(zip(keys, (0, 2 * self.num_attention_heads), strict=True))
        return {**values, **{PREFIX + key: values[key] for key in keys}, **wrong, "attn_implementation": ATTENTION}

    def stock_dict(self):
        """What the family's own config class takes: nothing is hidden and nothing is ours."""
        ours = ("model_type", "attnprune", "attn_implementation", "architectures", "auto_map")
        return {key: value for key, value in super().to_dict().items() if key not in ours}


def _guard(module, args):
    if module.config._attn_implementation != ATTENTION:
        raise RuntimeError("the attention implementation was switched, which would run this sparse model dense")


def _before_forward(model, args, kwargs):
    """Some families do not hand `output_attentions` down to the attention."""
    for module in model.modules():
        if isinstance(module, Gate):
            module.return_pattern = bool(kwargs.get("output_attentions"))


_classes = {}


def classes_for(family):
    """(config class, model class) of a family, e.g. `AttnPruneLlamaConfig` and `AttnPruneLlamaForCausalLM`."""
    if family not in FAMILIES:
        raise ValueError(f"no gated model for family {family!r}")
    if family not in _classes:
        import transformers

        base_model = getattr(transformers, FAMILIES[family][0])
        base_config = base_model.config_class
        names = {"__module__": __name__, "model_type": f"attnprune_{family}"}
        config = type(f"AttnPrune{base_config.__name__}", (GatedConfig, base_config), names)
        model = type(
            f"AttnPrune{base_model.__name__}",
            (GatedModel, base_model),
            {"__module__": __name__, "config_class": config},
        )
        _classes[family] = (config, model)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
    return _classes[family]


def register():
    """Make every family known to transformers' auto classes."""
    for family in FAMILIES:
        classes_for(family)


def __getattr__(name):
    """Make the classes on first use, so that `auto_map` can name them without importing every family."""
    if name.startswith("AttnPrune"):
        for family in FAMILIES:
            for cls in classes_for(family) if _stem(family) in name else ():
                if cls.__name__ == name:
                    return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _stem(family):
    model = FAMILIES[family][0]
    return model.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
