"""Tokenizers and texts for tests of the data."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import random

import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from attnprune.data.sources import documents

BOS, EOS = 256, 257

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nine", "zebras", "watch", "us"]


def byte_tokenizer(adds_bos=False, **special):
    """One token per byte, 256 <s>, 257 </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def prose(characters, seed=0):
    generator = random.Random(seed)
    lines = (" ".join(generator.choices(WORDS, k=generator.randint(1, 30))) for _ in itertools.count())
    text = ""
    while len(text) < characters:
        text += next(lines) + "\n"
    return text


# Self-written text


class StartTokens:
    def __init__(self, bos=0, eos=1):
        self.bos_token_id = bos
        self.eos_token_id = eos


# Sources


def read(path, *field):
    """All documents of a source."""
    return list(documents(str(path), *field))


def written(folder, suffix, rows, field="text"):
    """A file of these rows; each is a document."""
    file = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({field: pyarrow.array(rows)}), file)
    else:
        file.write_text("".join(json.dumps({field: row}) + "\n" for row in rows))
    return file


def on_the_hub(monkeypatch, rows, field="text"):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter([{field: row} for row in rows]))
    return "some/set"


def parquet_bytes():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["hello world"] * 3}), sink)
    return sink.getvalue().to_pybytes()


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}
