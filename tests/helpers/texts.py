"""Tokenizers and texts for tests of the data."""

from __future__ import annotations

import itertools
import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

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
