"""What the benchmark measures is what it says: checks at the timed shape, densities, memory, commits, real layers."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from attnprune.attention.interface import attach
from attnprune.bench import attention, clock, providers
from attnprune.bench.cases import SUITES, captured_case
from attnprune.bench.providers import _ours, attend, step
from attnprune.cli import app
from attnprune.errors import InputError
from tests.helpers.bench import CPU, case
from tests.helpers.factory import save_text, save_tiny_llama, spread
from tests.helpers.sidecars import save_sidecar


def test_a_provider_that_is_wrong_only_far_from_the_start_is_found(monkeypatch):
    made, right = case("prefill", keys=400), _ours
    assert [row.status for row in attention.measure(made, ["chunked"], 1)] == ["ok"]

    def wrong_later(backend, case):
        def run(*tensors):
            output, penalty = right(backend, case)(*tensors)
            return torch.cat([output[:, :, :300], 0.9 * output[:, :, 300:]], 2), penalty

        return run

    monkeypatch.setattr(providers, "_ours", wrong_later)
    [row] = attention.measure(made, ["chunked"], 1)
    assert row.status == "wrong"


@pytest.mark.parametrize("noise", [False, True])
def test_gates_on_their_threshold_do_not_count_as_errors(noise):
    """A head whose bias puts one gate within rounding of zero: its row is left out, the others are compared."""
    made = case("train", noise=noise, keys=64, batch=2)
    expected, decided = attention._expected(made, torch.randn_like(made.query), True, True)
    assert decided[1, 1, 40]
    scores = made.query[:, -2:].double() @ made.key[:, -1:].double().transpose(-1, -2) * made.scaling
    if noise:
        scores = scores + attention._noise(made, 2, torch.arange(64))
    at_threshold = replace(made, bias=torch.cat([made.bias[:2], -scores[1, :, 40, 3].float()]))
    _, decided = attention._expected(at_threshold, torch.randn_like(made.query), True, True)
    assert decided.shape == (2, 2, 64, 1)
    assert not decided[1, 1, 40]
    assert decided.sum() >= 2 * 2 * 64 - 4  # the others stay
    assert attention.error_of("chunked", at_threshold) < 1e-5
    assert len(expected) == 5


def test_right_providers_are_judged_right_whatever_the_seed():
    for seed in range(4):
        for suite in SUITES:
            assert attention.error_of("chunked", case(suite, keys=320, seed=seed)) < 1e-5


def test_density_holds_for_every_sequence_and_a_single_query():
    made = case("decode", density=0.01, keys=1000, batch=4)
    assert made.density() == pytest.approx(0.01, rel=0.03)


def test_memory_of_a_training_step_holds_its_gradients():
    made = case("train", keys=512, width=64, heads=8, kv_heads=8)
    peak = clock.peak_bytes(step(attend("sdpa-flash", made), made), CPU)
    gradients = 3 * made.query.numel() * 4
    assert peak is None or peak > gradients


def test_a_checkout_is_named_and_a_foreign_one_is_not(tmp_path, monkeypatch):
    package = Path(attention.__file__).parents[1]
    inside = tmp_path / "project" / "env" / "attnprune"
    shutil.copytree(package, inside, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    run = partial(subprocess.run, cwd=tmp_path / "project", check=True, capture_output=True)
    (tmp_path / "project" / ".gitignore").write_text("env\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", ".gitignore"], ["commit", "-qm", "theirs"]):
        run([*git, *arguments])
    program = "import torch; from attnprune.bench import clock; print(clock._commit())"
    look = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(inside.parent)}
    assert run(look, env=environment).stdout.split() == [b"None"]
    run([*git, "add", "-f", "env"])
    run([*git, "commit", "-qm", "ours"])
    head = run([*git, "rev-parse", "HEAD"]).stdout.strip()
    assert run(look, env=environment).stdout.strip() == head
    (inside / "attention" / "gates.py").write_text("")
    assert run(look, env=environment).stdout.strip() == head + b"-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert clock.machine(CPU).commit is None


def test_layers_with_another_scaling_keep_it_and_richer_ones_are_refused(tiny_llama):
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    shape = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    ids = torch.randint(1, 97, (1, 40))
    granite = spread(GraniteForCausalLM(GraniteConfig(**shape, attention_multiplier=1.5)))
    gates = attach(granite, 0.3)
    made = captured_case("prefill", granite, ids, 1, "granite", torch.float32)
    with torch.no_grad():
        granite(input_ids=ids, use_cache=False)
    last = gates[1].last
    assert last is not None
    assert made.scaling == 1.5
    assert made.density() == pytest.approx(int(last.open_edges.sum()) / int(4 * last.visible_edges))
    assert attention.error_of("chunked", made) < 1e-5
    assert attention.error_of("sdpa-math", made) < 1e-5
    gemma = spread(Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, sliding_window=16)))
    attach(gemma)
    with pytest.raises(InputError, match="capped scores"):
        captured_case("prefill", gemma, ids, 0, "gemma2", torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float12"], "--dtype: 'float12'"),
        (["--from", "sparse", "--base", "base", "--data", "missing.txt"], "missing.txt: no such file"),
        (["--from", "sparse", "--base", "base", "--data", "text.txt", "--seq-len", "65"], "context of 64"),
    ],
)
def test_bad_texts_and_types_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    save_sidecar(tmp_path / "sparse", save_tiny_llama(tmp_path / "base"))
    save_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attnprune", "bench", "attention", "--seq-len", "16", *arguments])
    assert app.run() == 2
    assert message in capsys.readouterr().err


def test_a_model_with_dropout_trains(tmp_path, monkeypatch, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.helpers.factory import byte_tokenizer

    config = GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attnprune", "bench", "train", "gpt2", "--seq-len", "16", "--repeats", "1"])
    assert app.run() == 0, capsys.readouterr().err


def test_a_wrong_provider_ends_with_exit_code_4(monkeypatch, capsys):
    monkeypatch.setattr(providers, "_eager", lambda case: lambda query, key, value, bias: (0.9 * value, None))
    arguments = ["--seq-len", "16", "--suite", "prefill", "--provider", "eager", "--repeats", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["attnprune", "bench", "attention", *arguments])
    assert app.run() == 4
    assert "relative error" in capsys.readouterr().err
