"""Explicit masks: which edges are open on one text, bit-packed in a safetensors file. No torch.

The prose specification is the section "Explicit masks" of formats/attnprune-v1.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnprune.errors import AttnPruneError, InputError
from attnprune.files import check_writable, reason, unusable, write_atomic
from attnprune.sidecar import format

FORMAT = "attnprune-mask"
FORMAT_VERSION = "1.0"
MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Mask:
    """The open edges of one text: packed u8 [layers, heads, T, ceil(T / 8)] and the token ids i32 [T].

    Edge (query i, key j) of a head is bit `j % 8`, counted from the least significant, of byte `[i, j // 8]`.
    """

    packed: np.ndarray
    input_ids: np.ndarray

    def layer(self, index: int) -> np.ndarray:
        """The edges of one layer as bool [heads, query, key]."""
        bits = np.unpackbits(self.packed[index], axis=-1, count=len(self.input_ids), bitorder="little")
        return bits.astype(bool)


def pack(is_open: np.ndarray) -> np.ndarray:
    """bool [..., T] -> u8 [..., ceil(T / 8)]: key j is bit `j % 8`, from the least significant, of byte `j // 8`."""
    return np.packbits(is_open, axis=-1, bitorder="little")


def check_target(path: Path) -> None:
    """Refuse a place where no mask can be written; call it before any work.

    Raises:
        InputError: the file exists, or its folder does not or is not writable.
    """
    try:
        path.lstat()
        raise InputError(f"{path}: exists, and is not overwritten")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise unusable(path, error) from None
    check_writable(path.parent)


def save(path: str | Path, packed: np.ndarray, input_ids: Sequence[int]) -> None:
    """Write a mask file: all of it or nothing.

    Args:
        path: a file that does not exist yet.
        packed: u8 [layers, heads, T, ceil(T / 8)], see `pack`.
        input_ids: the T token ids of the text.

    Raises:
        InputError: the file exists, its folder does not, or the mask does not pass `read`.
        AttnPruneError: the file cannot be written.
    """
    from safetensors.numpy import save as serialise

    path = Path(path)
    check_target(path)
    tensors = {"mask": np.ascontiguousarray(packed), "input_ids": np.asarray(input_ids, np.int32)}
    raw = serialise(tensors, metadata={"format": FORMAT, "format_version": FORMAT_VERSION})
    parse(raw, str(path))
    try:
        write_atomic(path, raw)
    except OSError as error:
        kind = InputError if isinstance(error, PermissionError) else AttnPruneError
        raise kind(f"{path}: {reason(error)}") from None


def read(path: str | Path) -> Mask:
    """Read a mask file strictly.

    Raises:
        InputError: missing or damaged file, another format or version, or a mask that breaks a rule of the format.
    """
    path = Path(path)
    return parse(format.read_regular(path.parent, path.name, MAX_FILE_BYTES), str(path))


def parse(raw: bytes, name: str) -> Mask:
    """Check and parse the bytes of a mask file; `name` is used in messages.

    Raises:
        InputError: as `read`.
    """
    entries = format.parse_safetensors(raw, name)
    _check_metadata(raw, name)
    wrong = sorted({"mask", "input_ids"} ^ set(entries))
    if wrong:
        raise InputError(f"{name}: {wrong[0]} is {'unexpected' if wrong[0] in entries else 'missing'}")
    arrays = format.read_arrays(raw, name)
    packed, ids = arrays["mask"], arrays["input_ids"]
    if ids.dtype.str != "<i4" or ids.ndim != 1 or ids.min() < 0:
        raise InputError(f"{name}: input_ids is not a list of token ids in I32")
    if packed.dtype.str != "|u1" or packed.ndim != 4 or packed.shape[2:] != (len(ids), -(-len(ids) // 8)):
        raise InputError(f"{name}: mask is not U8 [layers, heads, T, ceil(T / 8)] for the T = {len(ids)} tokens")
    for layer, heads in enumerate(packed):
        if _has_unseen_keys(heads):
            raise InputError(f"{name}: mask of layer {layer} has a bit after its query or after the last token")
    return Mask(packed, ids)


def _check_metadata(raw: bytes, name: str) -> None:
    length = int.from_bytes(raw[:8], "little")
    header = format.parse_json(raw[8 : 8 + length].rstrip(b" "), f"{name} header", format.MAX_HEADER_BYTES)
    metadata = header.get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise InputError(f"{name}: not an attnprune mask")
    version = str(metadata.get("format_version"))
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise InputError(
            f"{name}: mask format {version[:20]} is not one this version reads", "pip install -U attnprune"
        )


def _has_unseen_keys(packed: np.ndarray) -> bool:
    """Whether a layer [heads, T, bytes] has a bit at a key after its query; padding bits come after every query."""
    above = np.array([0xFF & ~((1 << seen) - 1) for seen in range(9)], np.uint8)  # the bits of the keys not yet seen
    first_key = 8 * np.arange(packed.shape[2])
    for start in range(0, packed.shape[1], 512):  # in pieces, so that memory stays far below that of a long text
        rows = packed[:, start : start + 512]
        queries = np.arange(start, start + rows.shape[1])[:, None]
        hidden = above[np.clip(queries + 1 - first_key, 0, 8)]
        if any((head & hidden).any() for head in rows):
            return True
    return False
