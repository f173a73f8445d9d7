"""Packing into blocks, the seeded split, fingerprints."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from attnprune.data import tokens
from attnprune.data.blocks import IGNORED_LABEL, Blocks, Source, mix, pack, split
from attnprune.data.chat import Conversation
from tests.helpers.factory import refused
from tests.helpers.texts import BOS, EOS, byte_tokenizer, prose


def ids_of(text):
    return byte_tokenizer()(text)["input_ids"]


# Packing


def test_documents_are_joined_by_the_end_of_text_token():
    blocks = pack(["ab", "cde"], byte_tokenizer(), 3, 100, "name")
    assert blocks.input_ids.tolist() == [[*ids_of("ab"), EOS], ids_of("cde")]  # the last EOS is in the dropped tail
    assert blocks.input_ids.dtype == torch.int64
    assert torch.equal(blocks.labels, blocks.input_ids)
    assert blocks.name == "name"
    assert (len(blocks), blocks.seq_len) == (2, 3)


def test_a_block_crosses_documents_and_the_tail_is_dropped():
    blocks = pack(["abc", "d", "", "efgh"], byte_tokenizer(), 4, 100, "name")
    stream = [*ids_of("abc"), EOS, *ids_of("d"), EOS, EOS, *ids_of("efgh"), EOS]
    assert blocks.input_ids.flatten().tolist() == stream[:12]


def test_every_block_starts_with_bos_when_the_tokenizer_adds_it():
    blocks = pack(["abcdefg", "hij"], byte_tokenizer(adds_bos=True), 4, 100, "name")
    stream = [*ids_of("abcdefg"), EOS, *ids_of("hij"), EOS]
    assert blocks.input_ids[:, 0].tolist() == [BOS] * 4
    assert blocks.input_ids[:, 1:].flatten().tolist() == stream[:12]


def test_a_bos_token_the_tokenizer_does_not_add_is_not_added():
    assert BOS not in pack(["abcdefg"], byte_tokenizer(), 4, 100, "name").input_ids


def test_without_an_end_of_text_token_documents_are_adjacent():
    blocks = pack(["abc", "def"], byte_tokenizer(eos_token=None), 6, 100, "name")
    assert blocks.input_ids.tolist() == [ids_of("abcdef")]


@pytest.mark.parametrize("texts", [["abc"], ["a", "b"], [], [""]])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_text_shorter_than_one_block_is_refused(texts, adds_bos):
    error = refused(
        lambda: pack(texts, byte_tokenizer(adds_bos), 6, 100, "name"), "name", "shorter than one block of 6"
    )
    assert "--seq-len" in error.hint


def test_text_of_exactly_one_block_is_enough():
    assert len(pack(["abc"], byte_tokenizer(), 4, 100, "name")) == 1


@pytest.mark.parametrize(("max_tokens", "rows"), [(40, 10), (43, 10), (4, 1), (1, 1)])
def test_no_more_than_max_tokens_and_no_endless_reading(max_tokens, rows):
    taken = Counter()

    def endless():
        for _ in range(1000):
            taken["documents"] += 1
            yield "abcdefghij"

    blocks = pack(endless(), byte_tokenizer(), 4, max_tokens, "name")
    assert blocks.input_ids.shape == (rows, 4)
    assert taken["documents"] <= max_tokens // 11 + 2


# Long documents


class Counting:
    """A tokenizer that counts the characters it is given; `fast` as its own, or one that knows no places of tokens."""

    def __init__(self, tokenizer, fast):
        self.tokenizer, self.is_fast, self.characters = tokenizer, fast, 0
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

    def __call__(self, texts, **options):
        self.characters += len(texts) if isinstance(texts, str) else sum(map(len, texts))
        return self.tokenizer(texts, **options)


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(tokens, "WINDOW", 512)
    monkeypatch.setattr(tokens, "_OVERLAP", 128)


def whole(document, tokenizer):
    return [token for piece in tokens.whole_document(document, tokenizer, "name") for token in piece]


@pytest.mark.parametrize("fast", [True, False])
def test_a_long_document_is_not_tokenized_far_beyond_max_tokens(small_windows, fast):
    tokenizer = Counting(byte_tokenizer(), fast)
    assert len(pack([prose(200_000)], tokenizer, 10, 500, "name")) == 50
    assert tokenizer.characters < 20_000


PIECES = {
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "bytes with a space in front": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "words, the first with a space": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "words, all with a space": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "no words": None,
}
TEXTS = {
    "prose": prose(6000, seed=1),
    "lines of Windows": prose(3000, seed=2).replace("\n", "\r\n"),
    "one letter": "a" * 3001,
    "a run between words": prose(900) + "a" * 1501 + " " + prose(900),
    "runs of spaces and line ends": prose(700) + " " * 1203 + prose(700) + "\n" * 1403 + prose(300),
    "rules": ("=" * 397 + "\n") * 9,
    "no words": "".join(random.Random(3).choices("abcde", k=3000)),
    "other scripts": "".join(random.Random(4).choices("äöü日本語、。🙂👩‍👩‍👧 é e\u0301 \n\t.,", k=3000)),
    "special tokens": "".join(random.Random(5).choices(["</s>", "</ s>", " a", "b "], k=1500)),
}


@pytest.fixture(scope="module", params=PIECES)
def any_tokenizer(request):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if PIECES[request.param] is not None:
        tokenizer.pre_tokenizer = PIECES[request.param]
    else:  # as in Llama 2: the whole text is one word
        space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(space)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<unk>", "</s>"],
    )
    runs = ["a" * 40, " " * 60, "\n" * 30, "=" * 50]
    tokenizer.train_from_iterator([prose(20_000), *runs * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
def test_a_long_document_has_the_tokens_of_one_call(small_windows, any_tokenizer, text):
    for document in (TEXTS[text], TEXTS[text][3:]):
        expected = any_tokenizer(document, add_special_tokens=False)["input_ids"]
        assert whole(document, any_tokenizer) == expected
        assert pack([document], any_tokenizer, 1, 10**9, "name").input_ids.flatten().tolist()[:-1] == expected


@pytest.mark.parametrize("name", ["bytes with a space in front", "words, all with a space"])
def test_no_space_is_put_into_a_document_of_real_length(name):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = PIECES[name]
    trainer = trainers.WordLevelTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    text = prose(300_000, seed=6)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert whole(text, tokenizer) == tokenizer(text)["input_ids"]


def test_a_tokenizer_that_knows_no_places_gives_the_tokens_of_one_call(monkeypatch):
    monkeypatch.setattr(tokens, "WINDOW", 2000)
    monkeypatch.setattr(tokens, "_OVERLAP", 200)
    text, tokenizer = prose(10_000), trained_tokenizer()
    assert whole(text, Counting(tokenizer, False)) == tokenizer(text)["input_ids"]


def test_characters_without_end_are_refused(small_windows, monkeypatch):
    monkeypatch.setattr(tokens, "_MAX_WINDOW", 4000)
    refused(lambda: pack(["a" * 20_000], byte_tokenizer(), 8, 10**6, "name"), "name: ", "without the end of a word")


def test_blocks_do_not_depend_on_how_many_windows_are_tokenized_at_once(small_windows, monkeypatch):
    tokenizer = trained_tokenizer()
    texts = [prose(5000, seed) for seed in range(3)] + ["", "x", prose(100)]
    together = pack(texts, tokenizer, 16, 10**6, "name")
    monkeypatch.setattr(tokens, "_WINDOWS_AT_ONCE", 1)
    assert pack(texts, tokenizer, 16, 10**6, "name").fingerprint == together.fingerprint


def trained_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["</s>"],
    )
    tokenizer.train_from_iterator([prose(20_000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


# Conversations end as their template ends them


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_conversation_is_neither_closed_nor_opened_twice(adds_bos):
    tokenizer = byte_tokenizer(adds_bos)
    chat = Conversation("<s>abc<s>")
    blocks = pack([chat, Conversation("def"), "gh"], tokenizer, 5, 100, "name")
    stream = [BOS, *ids_of("abc"), BOS, *ids_of("def"), *ids_of("gh"), EOS]
    if adds_bos:
        assert blocks.input_ids.tolist() == [stream[:5], [BOS, *stream[5:9]]]
    else:
        assert blocks.input_ids.flatten().tolist() == stream[:10]


# Mixing


def test_a_mixture_has_all_blocks_of_its_parts():
    ids = torch.arange(32).reshape(8, 4)
    parts = [Blocks(ids[:6], -ids[:6], "a", (Source("a", 24),)), Blocks(ids[6:], -ids[6:], "b", (Source("b", 8, 3),))]
    mixed = mix(parts)
    assert (mixed.name, mixed.sources) == ("a + b", (Source("a", 24), Source("b", 8, empty_rows=3)))
    assert torch.equal(mixed.input_ids, ids)
    assert torch.equal(mixed.labels, -ids)
    assert mix(parts[:1]) is parts[0]


# Blocks and split


def numbered(rows, seq_len=4):
    ids = torch.arange(rows * seq_len).reshape(rows, seq_len)
    return Blocks(ids, ids.clone(), "numbers")


def test_blocks_are_a_data_set():
    blocks = numbered(3)
    assert len(blocks) == 3
    assert {key: value.tolist() for key, value in blocks[1].items()} == {
        "input_ids": [4, 5, 6, 7],
        "labels": [4, 5, 6, 7],
    }
    assert blocks.take(torch.tensor([2, 0])).input_ids[:, 0].tolist() == [8, 0]


def first_tokens(blocks):
    return blocks.input_ids[:, 0].tolist()


@pytest.mark.parametrize(
    ("rows", "eval_tokens", "held_out"), [(100, 40, 10), (100, 43, 10), (100, 10**6, 20), (100, 1, 1)]
)
def test_split_holds_out_about_eval_tokens_and_at_most_a_fifth(rows, eval_tokens, held_out):
    train, held = split(numbered(rows), eval_tokens, seed=0)
    assert (len(train), len(held)) == (rows - held_out, held_out)


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 9, 50])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_disjoint_and_exhaustive(rows, seed):
    blocks = numbered(rows)
    train, held = split(blocks, 12, seed)
    assert len(train) >= 1
    assert len(held) >= 1
    assert sorted(first_tokens(train) + first_tokens(held)) == first_tokens(blocks)
    assert first_tokens(train) == sorted(first_tokens(train))
    assert first_tokens(held) == sorted(first_tokens(held))
    assert torch.equal(train.labels, train.input_ids)


def test_split_depends_on_the_seed_alone():
    before = torch.get_rng_state()
    same, again, other = (split(numbered(50), 40, seed)[1].fingerprint for seed in (1, 1, 2))
    assert same == again != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_blocks_are_refused(rows):
    error = refused(lambda: split(numbered(rows), 4, seed=0), "numbers", f"{rows} block(s)")
    assert error.hint


def test_the_fingerprint_is_that_of_the_content():
    ids = torch.arange(12)
    base = Blocks(ids.reshape(3, 4), ids.reshape(3, 4), "a")
    assert base.fingerprint == Blocks(base.input_ids.clone(), base.labels.clone(), "b").fingerprint
    token, label = base.input_ids.clone(), base.labels.clone()
    token[2, 3] += 1
    label[0, 0] = IGNORED_LABEL
    others = [
        Blocks(token, base.labels, "a"),
        Blocks(base.input_ids, label, "a"),
        Blocks(ids.reshape(4, 3), ids.reshape(4, 3), "a"),
        base.take(torch.tensor([1, 0, 2])),
        base.take(torch.tensor([0, 1])),
    ]
    assert len({blocks.fingerprint for blocks in [base, *others]}) == 6


def test_the_fingerprint_of_a_view_is_that_of_its_values():
    wide = torch.arange(24).reshape(3, 8)
    view = wide[:, ::2]
    assert Blocks(view, view, "a").fingerprint == Blocks(view.contiguous(), view.contiguous(), "a").fingerprint
