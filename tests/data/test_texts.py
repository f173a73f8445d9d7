"""The text of a run, from any source, and the addition task."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attnprune.data.blocks import IGNORED_LABEL
from attnprune.data.texts import addition_task, load_blocks
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
