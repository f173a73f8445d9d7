"""What transformers raises for a base model that it cannot read, as one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from attnprune.errors import AttnPruneError, InputError, UnsupportedModelError, is_fault, printable
from attnprune.sidecar.quiet import quiet


@contextmanager
def explained(name: str, kind: str, what: str) -> Iterator[None]:
    """Run transformers silently; whatever a bad file makes it raise (it has no class of its own) becomes one line."""
    with quiet(), failures_as(lambda error, reason: _explain(name, kind, error, reason, what)):
        yield


@contextmanager
def failures_as(explain: Callable[[BaseException, str], AttnPruneError]) -> Iterator[None]:
    """What transformers or tokenizers raise in this block is raised as what `explain` makes of it and of its reason."""
    try:
        yield
    except (AttnPruneError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        if not is_fault(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise explain(error, printable(reason, 200)) from error


def _explain(name: str, kind: str, error: BaseException, reason: str, what: str) -> AttnPruneError:
    """One line for transformers' many ways to fail."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(e).__name__ for e in chain}
    text = str(error)
    if "type `attnprune_" in text:
        return UnsupportedModelError(f"{name}: already sparsified")
    if kind == "gguf":
        return InputError(f"{name}: cannot read this GGUF file: {reason}")
    if kind == "hub":
        if kinds & {"RepositoryNotFoundError", "GatedRepoError", "HFValidationError"}:
            return InputError(
                f"{name}: no such folder, and not found on the Hub (or private)", hint="log in with: hf auth login"
            )
        if "RevisionNotFoundError" in kinds:
            return InputError(f"{name}: no such revision")
        network = {
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "ConnectError",
            "ConnectionError",
            "ConnectTimeout",
        }
        if kinds & network or "connect" in text.lower() or "offline" in text.lower():
            return AttnPruneError(
                f"{name}: not in the cache, and the Hub cannot be reached", hint="give a local folder or .gguf file"
            )
    if "trust_remote_code" in text:
        return InputError(f"{name}: needs custom code, which attnprune does not run")
    if "SafetensorError" in kinds:
        return InputError(f"{name}: damaged safetensors weights: {reason}")
    if "ignore_mismatched_sizes" in text:
        return InputError(f"{name}: the weights do not have the shapes that config.json says")
    if "model.safetensors" in text:
        return InputError(f"{name}: no safetensors weights")
    return InputError(f"{name}: cannot load {what}: {reason}")
