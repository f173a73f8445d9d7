"""Text that a model writes: its distribution, its seeds, its cache."""

from __future__ import annotations

import contextlib
import copy
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attnprune.data import drawing, sampling
from attnprune.data.sampling import pieces_of, rows_that_fit, sample, self_written
from attnprune.errors import AttnPruneError
from tests.helpers.factory import refused
from tests.helpers.texts import StartTokens


def write(writer, cache, *, seq_len=8, tokens=160, seed=0, key="key", start=None):
    return self_written(writer, start or StartTokens(), seq_len, tokens, seed, cache, key)


def test_self_written_blocks_start_with_bos(writer, tmp_path):
    blocks = write(writer, tmp_path)
    assert blocks.input_ids.shape == (20, 8)
    assert blocks.input_ids.dtype == torch.int64
    assert (blocks.input_ids[:, 0] == 0).all()
    assert torch.equal(blocks.labels, blocks.input_ids)
    assert blocks.name == "self"
    assert len({tuple(row) for row in blocks.input_ids.tolist()}) > 10  # sampled, not one answer repeated


def test_the_number_of_tokens_is_rounded_up_to_whole_blocks(writer, tmp_path):
    assert write(writer, tmp_path, tokens=73).input_ids.shape == (10, 8)


def test_every_token_can_be_written_also_bos_and_eos(writer, tmp_path):
    written = write(writer, tmp_path, seq_len=32, tokens=1024).input_ids[:, 1:].flatten()
    assert torch.bincount(written, minlength=32).min() > 0


def test_self_written_text_follows_the_models_own_distribution(writer, tmp_path):
    model = copy.deepcopy(writer)
    with torch.no_grad():
        model.lm_head.weight *= 25  # far from uniform
        written = write(model, tmp_path, seq_len=32, tokens=2048).input_ids
        log_p = model(written).logits[:, :-1].log_softmax(-1)
    surprise = -log_p.gather(-1, written[:, 1:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert entropy.mean() < 3.0  # ln 32 is 3.47
    assert (surprise - entropy).mean().abs() < 4 * (surprise - entropy).std() / surprise.numel() ** 0.5


def test_an_end_of_text_token_starts_the_text_where_there_is_no_bos(writer, tmp_path):
    assert (write(writer, tmp_path, start=StartTokens(None, 5)).input_ids[:, 0] == 5).all()


def test_a_tokenizer_without_start_token_is_refused(writer, tmp_path):
    refused(lambda: write(writer, tmp_path, start=StartTokens(None, None)), "self")
    assert not list(tmp_path.iterdir())


def test_self_written_text_is_deterministic_for_a_seed(writer, tmp_path):
    first = write(writer, tmp_path / "a")
    torch.manual_seed(99)
    assert write(writer, tmp_path / "b").fingerprint == first.fingerprint
    assert write(writer, tmp_path / "c", seed=1).fingerprint != first.fingerprint


def test_rows_can_be_written_together(writer):
    written = [sample(writer, StartTokens(), 60, 8, 0, at_once) for at_once in (0, 30, 60)]
    assert torch.equal(written[0], written[1])  # at most 32 at a time on a CPU, in pieces of one size
    assert written[2].shape == (60, 8)
    assert not torch.equal(written[0], written[2])
    assert len(written[0].unique(dim=0)) == 60  # no piece repeats another


def test_pieces_are_of_one_size_and_waste_little():
    assert [pieces_of(rows, 8) for rows in (1, 8, 9, 20, 800, 801)] == [1, 8, 5, 7, 8, 8]


def test_as_many_rows_are_sampled_as_fit(writer):
    assert rows_that_fit(writer, 8) == 32
    cache = writer(torch.zeros(1, 8, dtype=torch.int64), use_cache=True).past_key_values
    cached = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    on_cuda = SimpleNamespace(config=writer.config, dtype=writer.dtype, device=torch.device("cuda"))
    rows, logits = rows_that_fit(on_cuda, 8), 16 * writer.config.vocab_size
    assert rows * (cached + logits) <= sampling._CUDA_BYTES < (rows + 1) * (cached + logits)
    assert rows_that_fit(on_cuda, 10**9) == 8
    assert rows_that_fit(writer, 10**9) == 8


def test_self_written_text_leaves_the_global_generators_alone(writer, tmp_path):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())

    before = states()
    write(writer, tmp_path)
    assert states() == before


def no_drawing(*arguments):
    pytest.fail("drawn again")


def test_self_written_text_is_read_from_the_cache(writer, tmp_path, monkeypatch):
    first = write(writer, tmp_path)
    monkeypatch.setattr(sampling, "writer", no_drawing)
    assert write(writer, tmp_path).fingerprint == first.fingerprint
    assert torch.equal(write(writer, tmp_path).labels, first.labels)


def test_text_of_other_random_numbers_is_another_file(writer, tmp_path, monkeypatch):
    write(writer, tmp_path)
    monkeypatch.setattr(sampling, "DRAWS", sampling.DRAWS - 1)
    write(writer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("change", [{"seed": 1}, {"seq_len": 16}, {"tokens": 80}, {"key": "another"}])
def test_the_cache_keeps_different_requests_apart(writer, tmp_path, change):
    write(writer, tmp_path)
    write(writer, tmp_path, **change)
    assert len(list(tmp_path.iterdir())) == 2


def stop_after(monkeypatch, pieces):
    """The next drawing fails behind this many pieces; returns the list of the seeds that are drawn."""
    make, seeds = drawing.writer, []

    def writer(*arguments):
        write = make(*arguments)

        def counted(seed):
            if len(seeds) == pieces:
                raise ZeroDivisionError
            seeds.append(seed)
            return write(seed)

        return counted

    monkeypatch.setattr(sampling, "writer", writer)
    return seeds


def test_a_drawing_that_fails_at_once_leaves_nothing(writer, tmp_path, monkeypatch):
    stop_after(monkeypatch, 0)
    with pytest.raises(ZeroDivisionError):
        write(writer, tmp_path)
    assert not list(tmp_path.iterdir())


TORN = {
    "whole": lambda content: content,
    "cut": lambda content: content[:-5],
    "NULs": lambda content: content[:-40] + bytes(40),
    "half a piece more": lambda content: content + content[:700],
}


@pytest.mark.parametrize("torn", TORN)
def test_an_interrupted_drawing_goes_on_where_it_stopped(writer, tmp_path, monkeypatch, torn):
    whole = write(writer, tmp_path / "whole", tokens=8 * 32 * 5)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(ZeroDivisionError):
            write(writer, tmp_path / "torn", tokens=8 * 32 * 5)
    [part] = (tmp_path / "torn").iterdir()
    assert part.suffix == ".part"  # never taken for the whole text
    part.write_bytes(TORN[torn](part.read_bytes()))
    drawn = stop_after(monkeypatch, 9)
    assert torch.equal(write(writer, tmp_path / "torn", tokens=8 * 32 * 5).input_ids, whole.input_ids)
    assert len(drawn) == (3 if torn in ("cut", "NULs") else 2)
    [file] = (tmp_path / "torn").iterdir()
    assert torch.equal(load_file(file)["input_ids"], whole.input_ids)


def test_a_second_process_waits_for_the_first_and_takes_its_text(tmp_path):
    program = (
        "import sys, torch; from pathlib import Path; from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from attnprune.data.sampling import self_written; from tests.helpers.texts import StartTokens\n"
        "torch.manual_seed(0); torch.set_num_threads(1)\n"
        "config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,"
        " num_attention_heads=2, max_position_embeddings=64)\n"
        "model = LlamaForCausalLM(config).eval()\n"
        "blocks = self_written(model, StartTokens(), 64, 64 * 32 * 4, 0, Path(sys.argv[1]), 'key')\n"
        "print(blocks.fingerprint)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(printed) == 1
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]


def test_a_cache_that_cannot_be_written_is_refused_in_one_line(writer, tmp_path):
    (tmp_path / "cache").write_text("a file")
    refused(lambda: write(writer, tmp_path / "cache"), "cache")


@pytest.mark.parametrize("keep", [0, 100, 300])
def test_a_damaged_cache_file_is_never_a_crash(writer, tmp_path, keep):
    first = write(writer, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:keep])
    with contextlib.suppress(AttnPruneError):
        assert write(writer, tmp_path).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 50.0}, {"no_repeat_ngram_size": 1}, {"min_p": 0.9}, {"suppress_tokens": [3, 4, 5]}],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("way", ["fast", "generate"])
def test_the_checkpoints_own_generation_settings_do_not_bend_the_distribution(
    writer, tmp_path, monkeypatch, settings, way
):
    if way == "generate":
        monkeypatch.setattr(drawing, "obstacle", lambda model, seq_len: "as a test asks")
    plain = write(writer, tmp_path / "plain")
    for name, value in settings.items():
        monkeypatch.setattr(writer.generation_config, name, value)
    assert write(writer, tmp_path / "bent").fingerprint == plain.fingerprint
