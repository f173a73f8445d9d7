"""The sidecar format, version 1: file and tensor names, the manifest's schema, strict readers. No torch.

The prose specification is formats/attnprune-v1.md. Other code reads everything from here: `format.parse_manifest`.
"""

from attnprune.sidecar.format.adapter import AdapterConfig, check_lora, parse_adapter_config
from attnprune.sidecar.format.gate_arrays import check_gates
from attnprune.sidecar.format.manifest import (
    BaseEntry,
    FileEntry,
    GateEntry,
    Manifest,
    MergedEntry,
    ProbeEntry,
    ResultEntry,
    WeightsEntry,
    check_weights_entry,
    parse_manifest,
    parse_merged_config,
)
from attnprune.sidecar.format.names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    ATTENTION_MODULES,
    CODE_FILE,
    CODE_SUFFIXES,
    DELTA_FILE,
    FEATURES,
    FORMAT,
    FORMAT_VERSION,
    GATES_FILE,
    MANIFEST_FILE,
    MAX_FILES,
    MAX_GATE,
    MAX_GATES_BYTES,
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    MAX_RANK,
    MAX_TENSORS,
)
from attnprune.sidecar.format.reading import parse_json, read_regular
from attnprune.sidecar.format.tensors import check_finite, parse_safetensors, read_arrays

__all__ = [
    "ADAPTER_CONFIG_FILE",
    "ADAPTER_FILE",
    "ATTENTION_MODULES",
    "CODE_FILE",
    "CODE_SUFFIXES",
    "DELTA_FILE",
    "FEATURES",
    "FORMAT",
    "FORMAT_VERSION",
    "GATES_FILE",
    "MANIFEST_FILE",
    "MAX_FILES",
    "MAX_GATE",
    "MAX_GATES_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_JSON_BYTES",
    "MAX_RANK",
    "MAX_TENSORS",
    "AdapterConfig",
    "BaseEntry",
    "FileEntry",
    "GateEntry",
    "Manifest",
    "MergedEntry",
    "ProbeEntry",
    "ResultEntry",
    "WeightsEntry",
    "check_finite",
    "check_gates",
    "check_lora",
    "check_weights_entry",
    "parse_adapter_config",
    "parse_json",
    "parse_manifest",
    "parse_merged_config",
    "parse_safetensors",
    "read_arrays",
    "read_regular",
]
