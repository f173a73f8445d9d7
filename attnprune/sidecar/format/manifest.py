"""The manifest: its schema, and the checks that it passes before anything that it lists is read."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from attnprune.errors import InputError
from attnprune.sidecar.format.names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CODE_FILE,
    DELTA_FILE,
    FEATURES,
    FORMAT,
    GATES_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    MAX_FILES,
    MERGED_KEY,
    NAME,
    QUANTISED_BASE,
    WEIGHTS_FILE,
)
from attnprune.sidecar.format.reading import parse_json

_VERSION = re.compile(r"[1-9][0-9]{0,3}(\.[0-9]{1,4})?")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1, le=1024)]


class _Entry(BaseModel):
    """A manifest object: unknown keys are kept, so a newer minor version survives a round trip."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out our own optional keys where they have no value, and keep an unknown key even when it is null."""
        known = type(self).model_fields
        return {key: value for key, value in handler(self).items() if value is not None or key not in known}


class FileEntry(_Entry):
    """Size in bytes and sha256 of one file."""

    size: Size
    sha256: Sha256


class QuantisationEntry(_Entry):
    """How bitsandbytes holds the linear layers of a base that is needed quantised (since 1.3).

    `stored`: the base's own files hold codes and scales, and `structure` and `content` are of those; else the named
    base is in full precision and is quantised in this way while it is loaded. 4 bits have `quant_type`, `double_quant`
    and `compute_dtype`, 8 bits a `threshold` for outliers.
    """

    method: Literal["bitsandbytes"]
    bits: Literal[4, 8]
    stored: bool
    quant_type: Literal["nf4", "fp4"] | None = None
    double_quant: bool | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    skip_modules: list[Annotated[str, Field(max_length=256)]] | None = Field(default=None, max_length=1024)


class BaseEntry(_Entry):
    """The base model. `structure` hashes its (name, dtype, shape) list, `content` 256 sampled values per tensor;
    `config` holds the keys of its configuration that change what it computes (since 1.1).
    """

    kind: Literal["hub", "local", "gguf", "bundled"]
    repo_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")] | None = None
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    model_type: str
    dtype: str
    structure: Sha256
    content: Sha256
    config: dict[str, Any] | None = None
    quantisation: QuantisationEntry | None = None


class GateEntry(_Entry):
    """An edge is open when `score + bias > threshold`; heads[i] is the number of heads of layer i."""

    logit: Literal["score+bias"]
    threshold: Literal[0]
    heads: list[Positive] = Field(min_length=1, max_length=1024)


class WeightsEntry(_Entry):
    """How the weights differ from the base: not at all, by LoRA adapters, or by whole changed tensors."""

    kind: Literal["none", "lora", "delta"]
    rank: Positive | None = None
    alpha: Finite | None = None
    tensors: Size = 0


class SourceEntry(_Entry):
    """One of several sources of the run's text: its name, and the tokens in its blocks before some were held out."""

    data: str
    tokens: Size


class ResultEntry(_Entry):
    """Measured on held-out text with this very artefact. Losses and kl in nats per token."""

    loss: Finite
    base_loss: Finite
    control_loss: Finite | None = None
    kl: Finite
    density: Annotated[float, Field(ge=0, le=1)]
    edges_per_query: Finite
    open_edges: Size
    visible_edges: Size
    exact_match: Finite
    seq_len: Size
    tokens: Size
    data: str
    data_sha256: Sha256
    sources: Annotated[list[SourceEntry], Field(min_length=2, max_length=1024)] | None = None
    steps: Size
    seed: Size
    constraint: Literal["loss", "kl", "density"]
    limit: Finite
    feasible: bool


class TrainEntry(_Entry):
    """A run whose base was quantised in training (since 1.3), and the numbers that `result` does not say.

    `against` "quantised": the state as it trained, on the quantised base and compared with it. `against` "full": the
    artefact, which needs the quantised base, compared with the base in full precision. Losses and kl in nats per token.
    """

    load_in: Literal["4bit", "8bit"]
    against: Literal["quantised", "full"]
    loss: Finite
    base_loss: Finite
    kl: Finite
    density: Annotated[float, Field(ge=0, le=1)]


class ProbeRow(_Entry):
    """A text whose loss (nats per token) and open-edge count a reader reproduces within the tolerances."""

    input_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=1024)]
    loss: Finite
    open_edges: Size
    tolerance: Finite
    edge_tolerance: Size


class ProbeEntry(ProbeRow):
    """A short text, and a longer one where the context has room: windows and positions beyond the short one act there
    (since 1.1).
    """

    input_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=64)]
    long: ProbeRow | None = None


class MergedEntry(_Entry):
    """What a merged folder was made from: the dtype of its weights, the sidecar's own weights entry and probe.

    `config` is `config_fingerprint` of config.json; folders of older releases have none.
    """

    dtype: str
    config: Sha256 | None = None
    weights: WeightsEntry
    probe: ProbeEntry


class Manifest(_Entry):
    """attnprune.json: the only source of truth of a sidecar. `merged` is there only in a merged folder's block."""

    format: Literal["attnprune"]
    format_version: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,3}\.[0-9]{1,4}$")]
    requires: list[str]
    created_by: str
    base: BaseEntry
    gate: GateEntry
    weights: WeightsEntry
    result: ResultEntry
    probe: ProbeEntry
    files: dict[str, FileEntry]
    merged: MergedEntry | None = None
    train: TrainEntry | None = None

    def to_json(self) -> str:
        """Canonical text: sorted keys, two-space indent, final newline."""
        return json.dumps(self.model_dump(), sort_keys=True, indent=2, allow_nan=False) + "\n"


def parse_manifest(raw: bytes, name: str = MANIFEST_FILE) -> Manifest:
    """Check and parse a manifest.

    Raises:
        InputError: not JSON, a newer major version, an unknown required feature, or a key of the wrong type.
    """
    values = parse_json(raw, name)
    if not isinstance(values, dict):
        raise InputError(f"{name}: expected an object")
    if values.get("format") != FORMAT:
        raise InputError(f"{name}: not an attnprune manifest")
    version = values.get("format_version")
    if isinstance(version, str) and _VERSION.fullmatch(version) and int(version.split(".")[0]) > 1:
        raise InputError(f"{name}: format {version} needs a newer attnprune", hint="pip install -U attnprune")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    unknown = [feature for feature in manifest.requires if feature not in FEATURES]
    if unknown:
        raise InputError(f"{name}: needs {unknown[0]!r}, which this version does not know")
    if len(manifest.files) > MAX_FILES:
        raise InputError(f"{name}: too many files ({len(manifest.files)})")
    for file in manifest.files:
        parts = PurePosixPath(file).parts
        if (
            not parts
            or any(not NAME.fullmatch(part) or part in (".", "..") for part in parts)
            or "/".join(parts) != file
        ):
            raise InputError(f"{name}: bad file name {file!r}")
    return manifest


def parse_merged_config(values: Any, name: str = "config.json") -> Manifest:
    """The manifest in the parsed config.json of a merged model.

    Raises:
        InputError: no `attnprune` block, one that does not pass or is not of a merged model, or other values beside it
            than the ones it was written with.
    """
    if not isinstance(values, dict) or MERGED_KEY not in values:
        raise InputError(f"{name}: no attnprune block")
    manifest = parse_manifest(json.dumps(values[MERGED_KEY]).encode(), f"{name}: attnprune")
    if manifest.merged is None or manifest.weights.kind != "none":
        raise InputError(f"{name}: attnprune: not the manifest of a merged model")
    check_weights_entry(manifest)
    needed = {GATES_FILE, CODE_FILE} | ({INDEX_FILE} if INDEX_FILE in manifest.files else {WEIGHTS_FILE})
    missing = sorted(needed - set(manifest.files))
    if missing:
        raise InputError(f"{name}: attnprune: files: {missing[0]} is not listed")
    if manifest.merged.config not in (None, config_fingerprint(values)):
        raise InputError(f"{name}: is damaged (its values are not those that it was written with)")
    return manifest


def config_fingerprint(values: dict[str, Any]) -> str:
    """sha256 of a merged model's config.json without its `attnprune` block, as compact JSON with sorted keys."""
    rest = {key: value for key, value in values.items() if key != MERGED_KEY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_weights_entry(manifest: Manifest) -> None:
    """The kind of weights, the required features and the listed files must agree.

    Raises:
        InputError: naming what contradicts.
    """
    entry, listed = manifest.weights, set(manifest.files)
    expected = {"none": set(), "delta": {DELTA_FILE}, "lora": {ADAPTER_CONFIG_FILE, ADAPTER_FILE}}[entry.kind]
    for file in sorted({DELTA_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE} & (expected ^ listed)):
        problem = "not listed in" if file in expected else f"unexpected for weights {entry.kind!r} in"
        raise InputError(f"{file}: {problem} {MANIFEST_FILE}")
    if (manifest.base.quantisation is not None) != (QUANTISED_BASE in manifest.requires) and manifest.merged is None:
        raise InputError(f"{MANIFEST_FILE}: base.quantisation and the feature {QUANTISED_BASE!r} need each other")
    if manifest.base.quantisation is not None and entry.kind == "delta":
        raise InputError(f"{MANIFEST_FILE}: weights: a delta cannot change a quantised base")
    if entry.kind == "lora" and (entry.rank is None or entry.alpha is None or entry.alpha <= 0):
        raise InputError(f"{MANIFEST_FILE}: weights: lora needs a rank and an alpha above 0")
