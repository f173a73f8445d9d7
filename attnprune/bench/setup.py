"""From the options of `attnprune bench` to what is timed: cases of one layer, a pair of models, tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnprune.attention.interface import attach, gates_of
from attnprune.bench.cases import SUITES, Case, Suite, captured_case, gaussian_case
from attnprune.data.blocks import pack
from attnprune.data.sources import documents
from attnprune.data.vocabulary import check_tokens
from attnprune.errors import InputError
from attnprune.sidecar.bases import context_length, load_base, pick_device, torch_dtype
from attnprune.sidecar.folder import is_merged, open_sidecar
from attnprune.sidecar.hub import sparse_folder
from attnprune.sidecar.loading import default_base, load
from attnprune.training.calibration import bias_for_mass

Cases = list[tuple[str, Callable[[], Case]]]
"""Names of cases and what makes them: a case is made only once its turn comes."""


def suites_named(names: list[str]) -> list[Suite]:
    """The suites of these names.

    Raises:
        InputError: one that is not among SUITES.
    """
    for name in names:
        if name not in SUITES:
            raise InputError(f"--suite: {name} is not one of {', '.join(SUITES)}")
    return [suite for name in names for suite in SUITES if suite == name]


def device_named(name: str) -> torch.device:
    """The device that `pick_device` chooses."""
    return torch.device(pick_device(name))


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the inputs; auto: bfloat16 on CUDA, else float32.

    Raises:
        InputError: another name.
    """
    kind = ("bfloat16" if device.type == "cuda" else "float32") if name == "auto" else name
    if kind not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype: {name!r} is not float32, bfloat16, float16 or auto")
    return torch_dtype(kind)


def gaussian_cases(
    suites: list[Suite], lengths: list[int], densities: list[float], *, noise: bool, **options: Any
) -> Cases:
    """Random cases of every suite and length; of training only the first density. `options`: see `gaussian_case`."""
    return [
        (
            f"{suite} T{length} {density:g}",
            partial(
                gaussian_case, suite=suite, keys=length, density=density, noise=noise and suite == "train", **options
            ),
        )
        for length in lengths
        for suite in suites
        for density in (densities[:1] if suite == "train" else densities)
    ]


def captured_cases(
    source: str, base: str | None, data: Path, layer: int, suites: list[Suite], lengths: list[int],
    device: torch.device, dtype: torch.dtype,
) -> Cases:  # fmt: skip
    """Cases from a layer of a real sparse model that reads `data`.

    Raises:
        InputError: a length beyond the model's context, text that is shorter, or a token that the model does not have.
    """
    model, tokenizer = load(source, base, device=str(device))
    longest, context = max(lengths), context_length(model)
    if context is not None and longest > context:
        raise InputError(f"--seq-len: {longest} is more than the model's context of {context}")
    ids = pack(documents(str(data), tokenizer=tokenizer), tokenizer, longest, longest, data.name).input_ids
    check_tokens(ids, tokenizer, model.config.vocab_size, data.name)
    ids = ids.to(device)
    made: Cases = []
    for length in lengths:
        title = f"{Path(source).name} layer {layer} T{length} {str(dtype)[6:]}"
        for suite in suites:
            case = partial(captured_case, suite, model, ids[:, :length], layer, title, dtype)
            made.append((f"{suite} {title}", case))
    return made


def pair(name: str, base: str | None, device: str) -> tuple[Any, Any, torch.device]:
    """(dense base with SDPA, gated model, device); a base model gets gates at 99 % of its softmax mass."""
    where = device_named(device)
    folder = sparse_folder(name)
    if folder is None and base is not None:
        raise InputError(f"--base: {name} is a dense model itself")
    if folder is None:
        dense, gated = (load_base(name, device=where.type).model for _ in range(2))
        attach(gated)
        ids = random_tokens(gated, 1, min(128, context_length(gated) or 128), 0, where)
        for gate, bias in zip(gates_of(gated), bias_for_mass(gated, ids, 0.99), strict=True):
            gate.bias.data.copy_(bias)
    else:
        gated, _ = load(folder, base, device=where.type)
        named, revision = base, None
        if named is None:
            if is_merged(folder):
                raise InputError(f"{name}: is a merged model", hint="name its dense base with --base MODEL")
            named, revision = default_base(open_sidecar(folder))
        dense = load_base(named, revision=revision, device=where.type, dtype=gated.dtype).model
    dense.set_attn_implementation("sdpa")
    return dense, gated, where


def random_tokens(model: Any, batch: int, length: int, seed: int, device: torch.device, spare: int = 0) -> Tensor:
    """Token ids [batch, length], on `device`; `spare` more tokens must fit into the model's context.

    Raises:
        InputError: they do not.
    """
    context = context_length(model)
    if context is not None and length + spare > context:
        raise InputError(f"--seq-len: {length + spare} tokens are more than the model's context of {context}")
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=draw).to(device)
