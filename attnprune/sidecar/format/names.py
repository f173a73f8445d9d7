"""Names and limits of the format: files, features, how large anything may be."""

from __future__ import annotations

import re

from attnprune.runs.folder import MANIFEST_FILE as MANIFEST_FILE

FORMAT = "attnprune"
FORMAT_VERSION = "1.3"
SIZES_HIDDEN = "merged:sizes"
LORA_ALL = "lora:all-linear"
QUANTISED_BASE = "base:quantised"
FEATURES = frozenset({"gate:threshold", "weights:lora", "weights:delta", LORA_ALL, SIZES_HIDDEN, QUANTISED_BASE})

GATES_FILE = "gates.safetensors"
DELTA_FILE = "delta.safetensors"
ADAPTER_CONFIG_FILE = "adapter/adapter_config.json"
ADAPTER_FILE = "adapter/adapter_model.safetensors"
CODE_FILE = "modeling_attnprune.py"  # of a merged folder
TEMPLATES_FOLDER = "additional_chat_templates"  # of a merged folder: NAME.jinja, as transformers has it
# Vocabularies that may lie beside tokenizer.json, from which other programs (converters to GGUF) read a tokenizer.
VOCABULARY_FILES = (
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip
WEIGHTS_FILE = "model.safetensors"  # of a merged folder; several files have an index instead
INDEX_FILE = "model.safetensors.index.json"
MERGED_KEY = "attnprune"  # of the manifest in a merged folder's config.json

MAX_JSON_BYTES = 1 << 20
MAX_LARGE_JSON_BYTES = 64 << 20  # an index of some hundred thousand tensors, a vocabulary
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
MAX_RANK = 4
MAX_GATE = 1e4
MAX_GATES_BYTES = 256 << 20  # 1024 layers of 1024 heads
MAX_FILES = 1024

# Modules that hold an attention in the supported families; without LORA_ALL, LoRA may change nothing else.
ATTENTION_MODULES = frozenset({"self_attn", "attn", "attention"})
# Files that some loader would execute; none belongs beside a sidecar.
CODE_SUFFIXES = frozenset({".py", ".pyc", ".so", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npy", ".joblib"})
# Keys of transformers' JSON files that make it run code, or load weights other than those of the folder.
LOADER_HOOKS = frozenset(
    {"auto_map", "custom_generate", "custom_pipelines", "experts_implementation", "quantization_config",
     "transformers_weights"}
)  # fmt: skip
# Keys in which transformers' older versions wrote where a file lay.
LOCAL_PATHS = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")
NAME = re.compile(r"[A-Za-z0-9._-]{1,256}")
