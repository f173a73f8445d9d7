"""Every supported family as a tiny random model."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from attnprune.sidecar import modeling_attnprune
from tests.helpers.factory import spread

LAYERS, WINDOW, TOLERANCE = 4, 6, 1e-4

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}

QWEN = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}

EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}

OPTIONS = {
    "cohere2": ALTERNATING,
    "gemma2": ALTERNATING | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": ALTERNATING | {"query_pre_attn_scalar": 8},
    "gpt2": {"attn_pdrop": 0.0},
    "gpt_bigcode": {"attn_pdrop": 0.0},
    "gpt_oss": ALTERNATING | EXPERTS,
    "granite": {"attention_multiplier": 0.4},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW} | EXPERTS,
    "olmo3": ALTERNATING,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": QWEN,
    "qwen3": QWEN,
    "smollm3": QWEN | {"no_rope_layers": [1, 1, 1, 0], "layer_types": ALTERNATING["layer_types"]},
    "stablelm": {"qk_layernorm": True},
    "starcoder2": {"sliding_window": WINDOW},
}

NO_GROUPS = {"gpt2", "gpt_bigcode", "gpt_neox", "opt"}

BIAS = torch.linspace(-0.5, 0.8, LAYERS * 4).view(LAYERS, 4)


def build(family, seed=0):
    torch.manual_seed(seed)
    common = {key: value for key, value in COMMON.items() if not (family in NO_GROUPS and key == "num_key_value_heads")}
    config = AutoConfig.for_model(family, **common | OPTIONS.get(family, {}))
    model = spread(AutoModelForCausalLM.from_config(config))
    if family == "gpt_oss":
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.sinks.normal_()
    return model


def ids(rows, length, seed=1):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens, **options):
    with torch.no_grad():
        return model(input_ids=tokens, **{"use_cache": False} | options).logits


def merged(model):
    """The merged model of an attached one, built as `attnprune.sidecar.merged.write_merged` builds it."""
    config_class, model_class = modeling_attnprune.classes_for(model.config.model_type)
    values = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        values.pop(key, None)
    with torch.device("meta"):
        result = model_class(config_class(**values))
    result.load_state_dict(model.state_dict(), assign=True)
    result.tie_weights()
    return result.eval()


def load(folder, family, **options):
    return modeling_attnprune.classes_for(family)[1].from_pretrained(folder, **options)
