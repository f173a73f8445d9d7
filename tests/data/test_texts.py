"""The text of a run, from any source, and the addition task."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attnprune.data import texts
from attnprune.data.blocks import IGNORED_LABEL, Blocks, Source
from attnprune.data.texts import addition_task, load_blocks
from attnprune.errors import InputError
from attnprune.runs.config import build_config
from tests.helpers.factory import refused
from tests.helpers.texts import StartTokens, byte_tokenizer, prose

# The addition task


def character_tokenizer():
    vocabulary = {character: index for index, character in enumerate("0123456789+=#")} | {"<pad>": 13}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@pytest.fixture(scope="module")
def task():
    return addition_task(character_tokenizer())


def lines_of(blocks):
    return ["".join("0123456789+=#"[token] for token in row) for row in blocks.input_ids.tolist()]


def test_the_task_has_10000_rows_4096_of_them_held_out(task):
    train, held_out = task
    assert (tuple(train.input_ids.shape), tuple(held_out.input_ids.shape)) == ((5904, 10), (4096, 10))
    rows = lines_of(train) + lines_of(held_out)
    assert set(rows) == {f"#{a:02d}+{b:02d}={a + b:03d}" for a in range(100) for b in range(100)}
    assert len(rows) == 10_000


def test_every_sum_is_correct(task):
    for row in lines_of(task[0])[:500] + lines_of(task[1])[:500]:
        left, answer = row[1:].split("=")
        first, second = left.split("+")
        assert int(first) + int(second) == int(answer)


def test_only_the_answer_digits_count(task):
    for part in task:
        assert (part.labels[:, :7] == IGNORED_LABEL).all()
        assert torch.equal(part.labels[:, 7:], part.input_ids[:, 7:])
        assert part.name == "two-digit addition"


def test_the_held_out_sums_are_a_fixed_choice(task):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = addition_task(character_tokenizer())
    assert [blocks.fingerprint for blocks in again] == [blocks.fingerprint for blocks in task]
    assert torch.equal(torch.get_rng_state(), before)


# load: the source decides


def model_of(tokens):
    """All that matters of a model that writes no text."""
    return SimpleNamespace(config=SimpleNamespace(vocab_size=tokens))


def test_load_reads_packs_and_splits_a_local_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(prose(2000))
    config = build_config({"data": {"source": str(file), "seq_len": 10, "train_tokens": 300, "eval_tokens": 100}})
    train, held_out = load_blocks(config, model_of(258), byte_tokenizer(), "key")
    assert (len(train), len(held_out)) == (32, 8)  # 400 tokens, at most a fifth held out


def test_load_writes_its_own_text_into_the_users_cache(writer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = {
        "data": {"source": "self", "seq_len": 8, "eval_tokens": 16},
        "train": {"steps": 2, "batch_size": 4},
    }
    train, held_out = load_blocks(build_config(settings), writer, StartTokens(), "key")
    assert (len(train), len(held_out)) == (8, 2)  # 2 steps of 4 blocks, and 16 tokens more
    assert list((tmp_path / "attnprune").glob("self-*"))


def test_load_gives_the_addition_task_to_the_bundled_model_only(task):
    settings = {"data": {"source": "task"}, "model": {"name": "demo"}}
    train, held_out = load_blocks(build_config(settings), model_of(258), character_tokenizer(), "key")
    assert (train.fingerprint, held_out.fingerprint) == (task[0].fingerprint, task[1].fingerprint)
    other = build_config({"data": {"source": "task"}, "model": {"name": "other/model"}})
    refused(lambda: load_blocks(other, model_of(258), character_tokenizer(), "key"), "task")


# Several sources


@pytest.fixture
def two_texts(tmp_path):
    """A text of 3,000 characters and rows of 1,000, two of which are empty."""
    long, short = tmp_path / "long.txt", tmp_path / "short.jsonl"
    long.write_text("a" * 2999)
    rows = ["b" * 499, None, " ", "b" * 499]
    short.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(long), str(short)


def blocks_of(sources, **settings):
    data = {"source": sources, "seq_len": 10, "eval_tokens": 400} | settings
    config = build_config({"data": data, "train": {"steps": 2, "batch_size": 4}})
    return load_blocks(config, model_of(258), byte_tokenizer(), "key")


def test_several_sources_are_all_read_and_mixed(two_texts):
    train, held_out = blocks_of(list(two_texts))
    assert train.name == held_out.name == "long.txt + short.jsonl"
    assert train.sources == (Source("long.txt", 3000), Source("short.jsonl", 1000, empty_rows=2))
    assert (len(train), len(held_out)) == (360, 40)
    a, b = byte_tokenizer()("ab")["input_ids"]
    for part in (train, held_out):  # both are in both, about 3 : 1
        share = (part.input_ids == b).sum() / ((part.input_ids == a) | (part.input_ids == b)).sum()
        assert 0.05 < share < 0.45


def test_the_proportions_stay_where_there_is_too_much(two_texts):
    train, held_out = blocks_of(list(two_texts), train_tokens=600, eval_tokens=200)
    assert [source.tokens for source in train.sources] == [590, 200]  # 2,999 bytes and 1,060
    assert len(train) + len(held_out) == 79


def test_weights_say_the_proportions_and_repeat_nothing(two_texts):
    train, held_out = blocks_of(list(two_texts), weights=[1, 1])
    assert [source.tokens for source in train.sources] == [1000, 1000]
    assert len(train) + len(held_out) == 200
    train, _ = blocks_of(list(two_texts), weights=[0.5, 0.1])
    assert [source.tokens for source in train.sources] == [3000, 600]


def test_a_weight_for_each_source_is_needed(two_texts):
    with pytest.raises(InputError, match=r"data: weights: 1 for 2 sources"):
        blocks_of(list(two_texts), weights=[1])


def test_streams_share_what_the_run_needs(two_texts, monkeypatch):
    rows = [{"text": "c" * 99}] * 1000
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter(rows))
    train, _ = blocks_of(["org/one", two_texts[1], "org/two"])
    assert [(source.name, source.tokens) for source in train.sources] == [
        ("org/one", 160), ("short.jsonl", 1000), ("org/two", 160)
    ]  # fmt: skip


def test_text_of_the_model_and_other_text_are_mixed(two_texts, monkeypatch):
    def written(model, tokenizer, seq_len, tokens, *_):
        ids = torch.zeros(tokens // seq_len, seq_len, dtype=torch.int64)
        return Blocks(ids, ids, "self")

    monkeypatch.setattr(texts, "self_written", written)
    train, _ = blocks_of(["self", two_texts[0]])
    assert [(source.name, source.tokens) for source in train.sources] == [("self", 240), ("long.txt", 3000)]
    assert train.name == "self + long.txt"


def test_one_source_in_a_list_is_that_source(two_texts):
    assert [blocks.fingerprint for blocks in blocks_of([two_texts[0]])] == [
        blocks.fingerprint for blocks in blocks_of(two_texts[0])
    ]


def test_sources_that_cannot_be_mixed_are_refused(two_texts):
    refused(lambda: blocks_of(["task", two_texts[0]]), "its own task and nothing else")
    refused(lambda: blocks_of([two_texts[0], two_texts[0]]), "named twice")
    refused(lambda: blocks_of([two_texts[0], f"{two_texts[0]}x.txt"]), "no such file")
