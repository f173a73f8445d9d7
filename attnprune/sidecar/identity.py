"""Which base model a sidecar belongs to: fingerprints of a model's tensors, and the check against a manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attnprune.errors import InputError
from attnprune.sidecar import format

if TYPE_CHECKING:
    from torch import Tensor, nn


def structure_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the sorted (name, dtype, shape) list of a model's tensors."""
    lines = sorted(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def content_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over up to 256 evenly strided values of every tensor, as little-endian fp32."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)][:256].float().cpu()
        digest.update(name.encode() + b"\0" + sample.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that identify a base model: by name, tied ones once, gates left out."""
    return {name: p for name, p in model.named_parameters() if "attnprune_gate" not in name}


def check_base(manifest: format.Manifest, model: nn.Module, allow_mismatch: bool = False) -> None:
    """Refuse a base model that is not the one the sidecar was made for.

    Raises:
        InputError: other structure; or other content, unless `allow_mismatch`.
    """
    tensors = base_tensors(model)
    base = manifest.base
    name = base.repo_id or f"a {base.model_type} model"
    if structure_fingerprint(tensors) != base.structure:
        layers, heads = len(manifest.gate.heads), manifest.gate.heads[0]
        raise InputError(f"wrong base model: the sidecar was made for {name} ({layers} layers, {heads} heads)")
    if content_fingerprint(tensors) != base.content and not allow_mismatch:
        raise InputError(
            f"wrong base model: same structure as {name}, but not the weights the sidecar was made for"
            + (f" (revision {base.revision})" if base.revision else ""),
            hint="--allow-base-mismatch loads it all the same",
        )
