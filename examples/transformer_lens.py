"""A sparse model in TransformerLens, its gates as permanent hooks.

    python examples/transformer_lens.py SIDECAR_OR_MERGED [--base MODEL] --text "When Mary and John went to the store"

TransformerLens computes attention itself, from the weights alone: without these hooks a sparse model runs dense there.
Needs transformer-lens >= 3.9 (tested: 4.3.0), whose TransformerBridge wraps the Hugging Face model.
"""

import argparse
import sys
import types
from pathlib import Path

if __name__ == "__main__":  # run as a script, this file would be found in the place of the package of the same name
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import torch
from transformer_lens.model_bridge import TransformerBridge

import attnprune
from attnprune.attention.interface import gates_of
from attnprune.errors import AttnPruneError, UnsupportedModelError, printable

PROBE = 16  # tokens
TOLERANCE = 1e-3  # of the logits, relative to the largest one: rounding may move a score across its gate


class Gate:
    """The gates of one layer: they see the masked scores, then close edges of the pattern made from them."""

    def __init__(self, bias):
        self.bias, self.is_open = bias[:, None, None], None

    def see(self, scores, hook):
        """For `hook_attn_scores`: [batch, heads, queries, keys], what softmax gets."""
        self.is_open = scores + self.bias.to(scores.device) > 0

    def close(self, pattern, hook):
        """For `hook_pattern`. Nothing is renormalised: the rows of a gated pattern sum to 1 or less."""
        if self.is_open is None:
            raise RuntimeError("its scores are not shown before its pattern")
        is_open, self.is_open = self.is_open, None
        return pattern.masked_fill(~is_open, 0.0)


def process_weights(model, *args, **options):
    """For `enable_compatibility_mode()`: folding value biases into the output's needs pattern rows that sum to 1."""
    if options.pop("refactor_factored_attn_matrices", False):
        raise ValueError("refactor_factored_attn_matrices folds the value biases, which changes a gated model")
    TransformerBridge.process_weights(model, *args, **options | {"fold_value_biases": False})


@torch.no_grad()
def hooked(path, base=None):
    """The model of a sidecar or merged folder, named as for `attnprune.load`, as a TransformerBridge (CPU, fp32).

    `reset_hooks()` keeps the gates, `reset_hooks(including_permanent=True)` makes the model dense. A hook that edits
    `hook_attn_scores` moves the softmax, not the gates. Text gets the tokens that its own tokenizer gives it.

    Raises:
        UnsupportedModelError: TransformerLens does not know the family, does not let hooks change its pattern, or does
            not give the logits of `attnprune.load` on a few random tokens.
    """
    sparse, tokenizer = attnprune.load(path, base, dtype=torch.float32)
    vocabulary, context = sparse.config.vocab_size, getattr(sparse.config, "max_position_embeddings", PROBE)
    probe = torch.randint(vocabulary, (1, min(PROBE, context)), generator=torch.Generator().manual_seed(0))
    expected = sparse(input_ids=probe, use_cache=False).logits
    gates = [Gate(gate.bias.detach().clone()) for gate in gates_of(sparse)]
    attnprune.detach(sparse)
    sparse.config.architectures = [type(sparse).__name__]  # the bridge chooses by it, and merged folders go without
    family, prepends = sparse.config.model_type, tokenizer.bos_token_id in tokenizer("a").input_ids[:1]
    try:
        model = TransformerBridge.boot_transformers(str(path), hf_model=sparse, tokenizer=tokenizer, device="cpu")
        for layer, gate in enumerate(gates):
            model.add_perma_hook(f"blocks.{layer}.attn.hook_attn_scores", gate.see)
            model.add_perma_hook(f"blocks.{layer}.attn.hook_pattern", gate.close)
        difference = (model(probe) - expected).abs().max().item()
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(f"{family}: cannot be gated in TransformerLens: {printable(error, 150)}") from error
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise UnsupportedModelError(f"{family}: TransformerLens gives other logits, by up to {difference:.2g}")
    model.cfg.default_prepend_bos = prepends
    model.process_weights = types.MethodType(process_weights, model)  # as a method it follows copy.deepcopy(model)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="sidecar or merged model folder")
    parser.add_argument("--base", help="base model, where the sidecar does not name it")
    parser.add_argument("--text", required=True)
    options = parser.parse_args()
    try:
        bridge = hooked(options.path, options.base)
    except AttnPruneError as refusal:
        sys.exit(f"error: {refusal}" + (f" ({refusal.hint})" if refusal.hint else ""))
    logits, cache = bridge.run_with_cache(options.text)
    print(f"{logits.shape[1]} tokens, next: {bridge.tokenizer.decode(logits[0, -1].argmax())!r}")
    for layer in range(bridge.cfg.n_layers):
        edges = cache[f"blocks.{layer}.attn.hook_pattern"][0].count_nonzero((-2, -1))
        print(f"layer {layer:2}, edges of each head:", *edges.tolist())
