"""Tokenizers of other kinds: BOS, unknown words, no words, misaligned prompts."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from transformers import AutoTokenizer

from attnprune.circuit.tasks import load_task, words
from attnprune.circuit.tasks.encoding import Encoder, Lexicon, example
from tests.helpers.factory import byte_tokenizer, refused
from tests.helpers.tasks import SENTENCES, SMALL_LM, all_batches, word_tokenizer

# BOS and tokenizers that cannot


def test_bos_comes_first_and_roles_move_with_it(pairs):
    without = word_tokenizer(bos=False)
    for name in ("ioi", "greater-than", "pronoun"):
        with_bos, plain = load_task(name, pairs, count=12), load_task(name, without, count=12)
        for batch, other in zip(all_batches(with_bos), all_batches(plain), strict=True):
            assert batch.texts == other.texts
            assert (batch.clean[:, 0] == pairs.bos_token_id).all()
            assert torch.equal(batch.clean[:, 1:], other.clean)
            assert torch.equal(batch.corrupted[:, 1:], other.corrupted)
            assert torch.equal(batch.answers, other.answers)
            assert all(torch.equal(batch.roles[role], other.roles[role] + 1) for role in batch.roles)


@pytest.mark.parametrize("name", SENTENCES)
def test_a_tokenizer_without_words_is_refused(name, demo):
    for tokenizer in (byte_tokenizer(), demo, AutoTokenizer.from_pretrained(SMALL_LM)):
        error = refused(lambda tokenizer=tokenizer: load_task(name, tokenizer), f"{name}: this tokenizer", "needed")
        assert "induction" in str(error.hint)


def test_words_that_become_the_unknown_token_are_no_words(pairs):
    refused(lambda: load_task("pronoun", word_tokenizer(leave_out=tuple(words.MALE))), "pronoun", "0 male names", "12")
    refused(lambda: load_task("pronoun", word_tokenizer(leave_out=("she",))), "pronoun", "she")
    refused(lambda: load_task("sva", word_tokenizer(leave_out=tuple(chain(*words.VERBS[3:])))), "sva", "3 verbs")


def test_prompts_that_are_not_aligned_token_by_token_are_refused(smol):
    lexicon = Lexicon("mine", Encoder(smol), "0", 0)
    template = (0, "We saw {first} and {second} again")
    slots = {"first": "Mary", "second": "antidisestablishment"}
    refused(lambda: example(lexicon, template, slots, {"second": "John"}, [1], [2]), "mine", "does not align")
    swapped = {"first": slots["second"], "second": slots["first"]}  # equally many tokens, but the roles have moved
    refused(lambda: example(lexicon, template, slots, swapped, [1], [2]), "mine", "does not align")
    assert example(lexicon, template, slots, {"first": "John"}, [1], [2]).roles["first"] == (2, 3)


def test_tokenizers_without_enough_tokens(demo):
    refused(lambda: load_task("induction", demo), "induction", "13 printable tokens, 39 are needed")
    refused(
        lambda: load_task("addition", AutoTokenizer.from_pretrained(SMALL_LM)), "addition", "one token per character"
    )


def test_bad_arguments(smol):
    assert "greater-than" in str(refused(lambda: load_task("ioii", smol), "ioii: no such task").hint)
    refused(lambda: load_task("ioi", smol, count=0), "0 prompts")
    refused(lambda: load_task("pronoun", smol, count=4000), "pronoun: 4000 prompts in each split are too many")
    assert load_task("pronoun", smol, count=300).train
