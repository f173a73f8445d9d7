"""A sparse model in TransformerLens, its gates as permanent hooks: `attnprune.lens.load("gpt2-medium-attnprune")`.

TransformerLens computes attention itself, from the weights alone: without these hooks a sparse model runs dense there.
Needs transformer-lens >= 3.9 (tested: 4.3.0), whose TransformerBridge wraps the Hugging Face model:
`pip install "attnprune[lens]"`.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnprune.attention.interface import detach, gates_of
from attnprune.errors import InputError, UnsupportedModelError, checked, printable
from attnprune.sidecar import loading

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]

PROBE = 16  # tokens
TOLERANCE = 1e-3  # of the logits, relative to the largest one: rounding may move a score across its gate


class _Gate:
    """The gates of one layer: they see the masked scores, then close edges of the pattern made from them."""

    def __init__(self, bias: Tensor):
        self.bias = bias[:, None, None]
        self.is_open: Tensor | None = None

    def see(self, scores: Tensor, hook: Any) -> None:
        """For `hook_attn_scores`: [batch, heads, queries, keys], what softmax gets."""
        self.is_open = scores + self.bias.to(scores.device) > 0

    def close(self, pattern: Tensor, hook: Any) -> Tensor:
        """For `hook_pattern`. Nothing is renormalised: the rows of a gated pattern sum to 1 or less."""
        if self.is_open is None:
            raise RuntimeError("its scores are not shown before its pattern")
        is_open, self.is_open = self.is_open, None
        return pattern.masked_fill(~is_open, 0.0)


def _process_weights(model: Any, *args: Any, **options: Any) -> None:
    """For `enable_compatibility_mode()`: folding value biases into the output's needs pattern rows that sum to 1."""
    if options.pop("refactor_factored_attn_matrices", False):
        raise ValueError("refactor_factored_attn_matrices folds the value biases, which changes a gated model")
    _bridge().process_weights(model, *args, **options | {"fold_value_biases": False})


def _bridge() -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        missing = getattr(error, "name", None) or "transformer_lens"
        hint = 'pip install "attnprune[lens]"'
        raise InputError(f"TransformerLens cannot be imported: no {missing}", hint=hint) from error
    return TransformerBridge


@checked()
@torch.no_grad()
def load(path: str | Path, base: str | Path | None = None, *, revision: str | None = None) -> TransformerBridge:
    """The model of a sidecar or merged folder, named as for `attnprune.load`, as a TransformerBridge (CPU, fp32).

    `reset_hooks()` keeps the gates, `reset_hooks(including_permanent=True)` makes the model dense. A hook that edits
    `hook_attn_scores` moves the softmax, not the gates. Text gets the tokens that its own tokenizer gives it.

    Raises:
        InputError: TransformerLens is not installed; or as `attnprune.load`.
        UnsupportedModelError: TransformerLens does not know the family, does not let hooks change its pattern, or does
            not give the logits of `attnprune.load` on a few random tokens.
    """
    bridge = _bridge()
    sparse, tokenizer = loading.load(path, base, revision=revision, dtype=torch.float32)
    vocabulary, context = sparse.config.vocab_size, getattr(sparse.config, "max_position_embeddings", PROBE)
    probe = torch.randint(vocabulary, (1, min(PROBE, context)), generator=torch.Generator().manual_seed(0))
    expected = sparse(input_ids=probe, use_cache=False).logits
    gates = [_Gate(gate.bias.detach().clone()) for gate in gates_of(sparse)]
    detach(sparse)
    sparse.config.architectures = [type(sparse).__name__]  # the bridge chooses by it, and merged folders go without
    family, prepends = sparse.config.model_type, tokenizer.bos_token_id in tokenizer("a").input_ids[:1]
    try:
        model = bridge.boot_transformers(str(path), hf_model=sparse, tokenizer=tokenizer, device="cpu")
        for layer, gate in enumerate(gates):
            model.add_perma_hook(f"blocks.{layer}.attn.hook_attn_scores", gate.see)
            model.add_perma_hook(f"blocks.{layer}.attn.hook_pattern", gate.close)
        difference = (model(probe) - expected).abs().max().item()
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(f"{family}: cannot be gated in TransformerLens: {printable(error, 150)}") from error
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise UnsupportedModelError(f"{family}: TransformerLens gives other logits, by up to {difference:.2g}")
    model.cfg.default_prepend_bos = prepends
    model.process_weights = types.MethodType(_process_weights, model)  # as a method it follows copy.deepcopy(model)
    return model
