"""attnprune: sparse-attention post-training for interpretability.

Public names load on first use, so importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnprune import registration

__version__ = "0.1.0"

_HOMES = {
    "load": "attnprune.runtime",
    "attach": "attnprune.attention.interface",
    "detach": "attnprune.attention.interface",
    "sparsify": "attnprune.recipe",
    "RunConfig": "attnprune.config",
    "Sidecar": "attnprune.sidecar",
    "open_sidecar": "attnprune.sidecar",
}

if TYPE_CHECKING:
    from attnprune.attention.interface import attach, detach
    from attnprune.config import RunConfig
    from attnprune.recipe import sparsify
    from attnprune.runtime import load
    from attnprune.sidecar import Sidecar, open_sidecar

__all__ = ["RunConfig", "Sidecar", "__version__", "attach", "detach", "load", "open_sidecar", "sparsify"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'attnprune' has no attribute {name!r}")


registration.register()
