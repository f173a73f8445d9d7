"""The edges of a text in TransformerLens, counted from the patterns in its cache (see attnprune.lens).

python examples/transformer_lens.py SIDECAR_OR_MERGED [--base MODEL] --text "When Mary and John went to the store"
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script, this file would be found in the place of the package of the same name
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from attnprune import lens
from attnprune.errors import AttnPruneError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="sidecar or merged model folder")
    parser.add_argument("--base", help="base model, where the sidecar does not name it")
    parser.add_argument("--text", required=True)
    options = parser.parse_args()
    try:
        bridge = lens.load(options.path, options.base)
    except AttnPruneError as refusal:
        sys.exit(f"error: {refusal}" + (f" ({refusal.hint})" if refusal.hint else ""))
    logits, cache = bridge.run_with_cache(options.text)
    print(f"{logits.shape[1]} tokens, next: {bridge.tokenizer.decode(logits[0, -1].argmax())!r}")
    for layer in range(bridge.cfg.n_layers):
        edges = cache[f"blocks.{layer}.attn.hook_pattern"][0].count_nonzero((-2, -1))
        print(f"layer {layer:2}, edges of each head:", *edges.tolist())
