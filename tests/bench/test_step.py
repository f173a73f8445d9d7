"""`attnprune bench step`: every way really trains, what is counted is there, what cannot run says why."""

import json
import sys
from collections import Counter

import pytest
import torch

from attnprune.bench import step
from attnprune.bench.counts import MatmulBound, Operators, Product
from attnprune.bench.record import Record
from attnprune.cli import app
from attnprune.training.trainer import trainable_state
from tests.helpers.bench import CPU
from tests.helpers.factory import save_tiny_llama

TINY = step.Setting(CPU, shape=step.Shape(2, 192, 97), blocks=2, seq_len=16, lora_rank=4)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["attnprune", "bench", "step", *map(str, arguments)])
    return app.run()


def test_every_mode_is_measured_against_the_trainer_or_says_why_not():
    seen = []
    rows, left_out = step.run(TINY, ["trainer", "plain", "fast", "graph"], 2, 600.0, lambda row: seen.append(row))
    assert rows == seen
    assert left_out == []
    trainer, plain, fast, graph = rows
    if not torch.cuda.is_available():
        assert (graph.status, graph.timing) == ("could not run", None)
        assert "no CUDA device" in graph.note
    for row in (trainer, plain, fast):
        assert row.status == "ok", row.note
        assert row.timing.repeats == 2
        assert row.tokens_per_second == pytest.approx(1000 * 32 / row.timing.median_ms)
        assert row.ratio_to_trainer == pytest.approx(trainer.timing.median_ms / row.timing.median_ms)
        assert 0 < row.matmul_share < 2
    assert trainer.operators < fast.operators < plain.operators
    assert trainer.matmul_flops < fast.matmul_flops <= plain.matmul_flops  # the base runs too
    assert fast.waits < plain.waits


def test_the_products_of_a_step_are_those_of_the_model():
    watch = step.Watch(1, CPU)
    step.train(TINY, "trainer", watch.steps, [watch])
    counted = watch.operators.products
    width, tokens = 192, 32
    forward = counted[Product(tokens, width, 512, torch.float32)]  # gate and up, 8/3 of the width
    assert forward >= 2 * 2
    head = 2 * tokens * width * 97
    assert sum(p.flops * count for p, count in counted.items() if 97 in (p.m, p.k, p.n)) >= 2 * head


def test_all_modes_train_the_same_model_on_the_same_text():
    states = [trainable_state(step.train(TINY, mode, 3, []).model) for mode in ("plain", "fast")]
    assert states[0].keys() == states[1].keys()
    for name, plain in states[0].items():
        torch.testing.assert_close(states[1][name], plain, rtol=1e-3, atol=1e-4)
    start = trainable_state(step.train(TINY, "plain", 1, []).model)
    assert any(not torch.equal(start[name], plain) for name, plain in states[0].items())


def test_operators_waits_and_lists_are_counted():
    with Operators(CPU) as counted:
        numbers = torch.ones(4)
        torch.mm(torch.ones(2, 3), torch.ones(3, 4))
        numbers.tolist()
        counted.paused = True
        numbers.sum().item()
        counted.paused = False
        bool(numbers.sum() > 0)
    assert counted.waits == 2
    assert counted.products == Counter({Product(2, 3, 4, torch.float32): 1})
    assert Product(2, 3, 4, torch.float32).flops == 48
    before = counted.operators
    numbers.tolist()
    torch.ones(1)
    assert (counted.waits, counted.operators) == (2, before)


def test_a_count_survives_an_error_in_the_block():
    with pytest.raises(ZeroDivisionError), Operators(CPU):
        torch.ones(1).tolist()[0] / 0
    assert torch.Tensor.tolist is torch._C.TensorBase.tolist


def test_the_matmul_bound_adds_up():
    bound, product = MatmulBound(CPU, 1), Product(8, 8, 8, torch.float32)
    once = bound.milliseconds(Counter({product: 1}))
    assert once > 0
    assert bound.milliseconds(Counter({product: 10})) == pytest.approx(10 * once)


def test_a_budget_of_nothing_measures_the_first_mode():
    rows, left_out = step.run(TINY, ["fast", "plain", "graph"], 1, 0.0)
    assert [row.provider for row in rows] == ["fast"]
    assert rows[0].ratio_to_trainer is None
    assert left_out == ["plain", "graph"]


def test_scope_gates_has_no_plain_trainer():
    rows, _ = step.run(step.Setting(CPU, shape=TINY.shape, blocks=2, seq_len=16, scope="gates"), ["trainer"], 1, 600.0)
    assert "nothing trains" in rows[0].note


def test_a_real_model_through_the_command_line(tmp_path, monkeypatch, capsys):
    base, record = save_tiny_llama(tmp_path / "base"), tmp_path / "made.json"
    options = ("--blocks", 2, "--seq-len", 12, "--lora-rank", 2, "--repeats", 1, "--device", "cpu", "--out", record)
    assert command(monkeypatch, "--model", base, "--mode", "trainer", "--mode", "fast", "--json", *options) == 0
    printed = capsys.readouterr()
    made = Record.model_validate_json(record.read_text())
    assert json.loads(printed.out) == json.loads(record.read_text())
    assert [row.provider for row in made.rows] == ["trainer", "fast"]
    assert made.rows[0].configuration == "base, lora, fp32, 2 x 12 tokens"
    assert [line.split(":")[0] for line in printed.err.splitlines()][:1] == ["trainer"]


def test_the_record_is_written_as_rows_come(tmp_path, monkeypatch, capsys):
    record = tmp_path / "made.json"

    def killed(setting, mode, *others):
        if mode == "fast":
            raise KeyboardInterrupt
        return step.Row(suite="step", provider=mode, configuration="c", status="could not run", note="no")

    monkeypatch.setattr(step, "measure", killed)
    command(monkeypatch, "--mode", "plain", "--mode", "fast", "--device", "cpu", "--out", record)
    assert [row.provider for row in Record.model_validate_json(record.read_text()).rows] == ["plain"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "warp"], "--mode: warp"),
        (["--scope", "everything"], "train.scope"),
        (["--width", 100], "--width: 100"),
        (["--out", "no/such/folder/x.json"], "no such folder"),
        (["--model", "/no/such/model"], "/no/such/model"),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *arguments, "--device", "cpu") == 2
    assert message in capsys.readouterr().err
