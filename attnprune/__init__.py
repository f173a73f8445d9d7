"""attnprune: sparse-attention post-training for interpretability.

    import attnprune as ap

    sidecar = ap.sparsify("gpt2", data="text.txt", steps=1000)   # or a model, a tokenizer and texts already in memory
    model, tokenizer = ap.load(sidecar.path)
    ap.evaluate(sidecar.path, data="other.txt")
    ap.masks(model, tokenizer("The gate opens").input_ids)       # open edges, a sparse tensor per layer
    with ap.close_heads(model, [(3, 4)]):
        ...

Public names load on first use, so importing the package does not import torch. Every error of the package is an
`AttnPruneError`.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from attnprune.sidecar import registration

__version__ = "0.1.0"

# transformers imports bitsandbytes, which warns on some processors of code from the Hub that it does without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_HOMES = {
    "sparsify": "attnprune.api.running",
    "evaluate": "attnprune.api.commands",
    "circuit": "attnprune.api.commands",
    "diff": "attnprune.api.commands",
    "verify": "attnprune.api.commands",
    "merge": "attnprune.api.commands",
    "push": "attnprune.api.commands",
    "load": "attnprune.sidecar.loading",
    "attach": "attnprune.attention.interface",
    "detach": "attnprune.attention.interface",
    "masks": "attnprune.attention.interventions",
    "close_heads": "attnprune.attention.interventions",
    "open_gates": "attnprune.attention.interventions",
    "trace": "attnprune.tracing.run",
    "atlas": "attnprune.heads.run",
    "index": "attnprune.heads.indexing",
    "open_index": "attnprune.heads.store",
    "RunConfig": "attnprune.runs.config",
    "Sidecar": "attnprune.sidecar.folder",
    "open_sidecar": "attnprune.sidecar.folder",
    "AttnPruneError": "attnprune.errors",
    "InputError": "attnprune.errors",
}
_MODULES = ("lens",)

if TYPE_CHECKING:
    from attnprune import lens
    from attnprune.api.commands import circuit, diff, evaluate, merge, push, verify
    from attnprune.api.running import sparsify
    from attnprune.attention.interface import attach, detach
    from attnprune.attention.interventions import close_heads, masks, open_gates
    from attnprune.errors import AttnPruneError, InputError
    from attnprune.heads.indexing import index
    from attnprune.heads.run import atlas
    from attnprune.heads.store import open_index
    from attnprune.runs.config import RunConfig
    from attnprune.sidecar.folder import Sidecar, open_sidecar
    from attnprune.sidecar.loading import load
    from attnprune.tracing.run import trace

__all__ = [
    "AttnPruneError",
    "InputError",
    "RunConfig",
    "Sidecar",
    "__version__",
    "atlas",
    "attach",
    "circuit",
    "close_heads",
    "detach",
    "diff",
    "evaluate",
    "index",
    "lens",
    "load",
    "masks",
    "merge",
    "open_gates",
    "open_index",
    "open_sidecar",
    "push",
    "sparsify",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"attnprune.{name}")
    raise AttributeError(f"module 'attnprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


registration.register()
