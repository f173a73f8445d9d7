"""Real tokenizers and what tasks say on them."""

from __future__ import annotations

import re
from itertools import chain

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from attnprune.circuit.tasks import text, words
from attnprune.circuit.tasks.prompts import Prompts
from tests.helpers.paths import EXAMPLES

SMALL_LM = EXAMPLES / "small-lm"

SENTENCES = ["ioi", "ioi:s2-flip", "ioi:abc", "greater-than", "sva", "pronoun", "docstring"]


def word_tokenizer(bos: bool = True, leave_out: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """GPT-2's way of writing years (two tokens of two digits) and Llama's BOS, with every word of the tasks a token."""
    lists = [words.FEMALE, words.MALE, words.PLACES, words.OBJECTS, words.EVENTS, words.ARGUMENTS, words.METHODS]
    forms = [*chain(*lists), *chain(*words.THINGS), *chain(*words.PEOPLE), *chain(*words.VERBS), "she", "he", "the"]
    forms += [f"{number:02d}" for number in range(100)]
    forms += chain(*(re.findall(r"\w+", template) for template in text.IOI + text.PRONOUN + text.GREATER_THAN))
    vocabulary = {"<s>": 0, "<unk>": 1, " ": 2} | {symbol: 3 + i for i, symbol in enumerate(".,;:'()@\"\n")}
    for form in forms:
        for piece in (form, f" {form}"):
            if form not in leave_out:
                vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\d\d| ?[A-Za-z]+|[^\w]"), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def all_batches(task) -> list[Prompts]:
    return [*task.train, *task.validation, *task.test]


def rows(batches):
    """(batch, row) of all prompts."""
    return [(batch, row) for batch in batches for row in range(len(batch))]


def pair(noun):
    return f'"The {noun} here","The {noun}s here"," is| was"," are| were"\n'
