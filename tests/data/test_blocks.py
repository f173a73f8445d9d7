"""Packing into blocks, the seeded split, fingerprints."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from attnprune.data import blocks
from attnprune.data.blocks import IGNORED_LABEL, Blocks, _pieces, pack, split
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


def test_a_long_document_is_not_tokenized_far_beyond_max_tokens(monkeypatch):
    monkeypatch.setattr(blocks, "_PIECE_CHARACTERS", 100)
    tokenizer, seen = byte_tokenizer(), Counter()

    def counting(texts, **options):
        seen["characters"] += len("".join(texts))
        return tokenizer(texts, **options)

    for attribute in ("bos_token_id", "eos_token_id"):
        setattr(counting, attribute, getattr(tokenizer, attribute))
    assert len(pack([prose(20_000)], counting, 10, 500, "name")) == 50
    assert seen["characters"] < 2000


@pytest.mark.parametrize(
    "text", ["", "x", "ab\n" * 100, "y" * 500, "\n" * 300, prose(5000), "ä日" * 99 + "\n" + "z" * 64]
)
def test_pieces_join_to_the_document(monkeypatch, text):
    monkeypatch.setattr(blocks, "_PIECE_CHARACTERS", 64)
    pieces, last = zip(*_pieces(text), strict=True)
    assert "".join(pieces) == text
    assert all(len(piece) <= 64 for piece in pieces)
    assert last == (*[False] * (len(pieces) - 1), True)


def test_blocks_do_not_depend_on_how_many_pieces_are_tokenized_at_once(monkeypatch):
    tokenizer = trained_tokenizer()
    monkeypatch.setattr(blocks, "_PIECE_CHARACTERS", 64)
    texts = [prose(700, seed) for seed in range(9)] + ["", "x"]
    together = pack(texts, tokenizer, 16, 10**6, "name")
    monkeypatch.setattr(blocks, "_PIECES_AT_ONCE", 1)
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


def test_a_long_document_gives_almost_the_tokens_of_one_call():
    tokenizer, text = trained_tokenizer(), prose(200_000, seed=1)
    whole = tokenizer(text)["input_ids"]
    pieces = [piece for piece, _ in _pieces(text)]
    assert len(pieces) > 2  # 64 Ki characters each
    in_pieces = pack([text], tokenizer, 1, 10**9, "name").input_ids.flatten().tolist()
    assert tokenizer.decode(in_pieces[:-1]) == text
    assert abs(len(in_pieces) - 1 - len(whole)) <= 2 * len(pieces)
    first = int(0.99 * len(tokenizer(pieces[0])["input_ids"]))
    assert in_pieces[:first] == whole[:first]


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
