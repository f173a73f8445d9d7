"""The files of a merged folder against its manifest: what is known before any model is built. No torch."""

from __future__ import annotations

from typing import Any

from attnprune.errors import InputError
from attnprune.sidecar import format
from attnprune.sidecar.folder import Sidecar

Headers = dict[str, tuple[str, tuple[int, ...]]]


def check_files(sidecar: Sidecar) -> None:
    """Size and sha256 of every listed file, of a sidecar or merged folder.

    Raises:
        InputError: naming a file that is missing or damaged.
    """
    mapped = sidecar.mapped
    for name in sidecar.manifest.files:
        if name not in mapped:
            sidecar.read(name)


def check_weights(sidecar: Sidecar) -> Headers:
    """{tensor: (dtype, shape)} of a merged folder's weights, whose files, values and gates are checked.

    Raises:
        InputError: a damaged file, a non-finite value, an index that is not that of the files, or other gates than in
            gates.safetensors.
    """
    _ = sidecar.gates  # compared with those inside the weights
    headers: Headers = {}
    places: dict[str, str] = {}
    for file, raw in sidecar.mapped.items():
        format.check_finite(raw, file)
        for tensor, (dtype, shape, _, _) in format.parse_safetensors(raw, file).items():
            if tensor in headers:
                raise InputError(f"{file}: {tensor} is in {places[tensor]} as well")
            headers[tensor], places[tensor] = (dtype, shape), file
    if format.INDEX_FILE in sidecar.manifest.files:
        _check_index(sidecar, places)
    elif set(places.values()) != {format.WEIGHTS_FILE}:
        raise InputError(f"{sidecar.path}: weights beside {format.WEIGHTS_FILE} that no loader reads")
    return headers


def _check_index(sidecar: Sidecar, places: dict[str, str]) -> None:
    name = format.INDEX_FILE
    if format.WEIGHTS_FILE in sidecar.manifest.files:
        raise InputError(f"{sidecar.path}: both {format.WEIGHTS_FILE} and {name}")
    values: Any = format.parse_json(sidecar.read(name), name, format.MAX_LARGE_JSON_BYTES)
    if not isinstance(values, dict) or values.get("weight_map") != places:
        raise InputError(f"{name}: weight_map is not that of the files")
