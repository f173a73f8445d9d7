"""attnprune: sparse-attention post-training for interpretability.

Public names load on first use, so importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnprune.sidecar import registration

__version__ = "0.1.0"

_HOMES = {
    "load": "attnprune.sidecar.loading",
    "attach": "attnprune.attention.interface",
    "detach": "attnprune.attention.interface",
    "sparsify": "attnprune.training.recipe",
    "trace": "attnprune.tracing.run",
    "atlas": "attnprune.heads.run",
    "RunConfig": "attnprune.runs.config",
    "Sidecar": "attnprune.sidecar.folder",
    "open_sidecar": "attnprune.sidecar.folder",
}

if TYPE_CHECKING:
    from attnprune.attention.interface import attach, detach
    from attnprune.heads.run import atlas
    from attnprune.runs.config import RunConfig
    from attnprune.sidecar.folder import Sidecar, open_sidecar
    from attnprune.sidecar.loading import load
    from attnprune.tracing.run import trace
    from attnprune.training.recipe import sparsify

__all__ = [
    "RunConfig", "Sidecar", "__version__", "atlas", "attach", "detach", "load", "open_sidecar", "sparsify", "trace",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'attnprune' has no attribute {name!r}")


registration.register()
