"""The command line as a person meets it: real subprocesses, exit codes, one-line errors, nothing half-written."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from attnprune.cli import app
from tests.helpers.command import ENVIRONMENT, attnprune, listing
from tests.helpers.factory import save_text, save_tiny_llama

TINY = ["--seq-len", "16", "--eval-tokens", "160", "--batch-size", "4", "--eval-every", "4", "--save-every", "4",
        "--scope", "attn", "--tolerance", "0.5", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a text, and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_llama(folder / "model")
    save_text(folder / "text.txt")
    done = attnprune("sparsify", "model", "--data", "text.txt", "--steps", 8, *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def refused(place: Path, *arguments, code: int = 2, message: str, **environment) -> None:
    """The command fails with that code and one line on stderr, and changes nothing."""
    before = listing(place)
    done = attnprune(*arguments, cwd=place, **environment)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert [line for line in lines if line.startswith("attnprune:")] == lines[-1:], done.stderr
    assert message in lines[-1]
    assert "Traceback" not in done.stdout + done.stderr
    assert listing(place) == before


QUICK = [
    ((), "no command given"),
    (("frobnicate",), "No such command"),
    (("sparsify",), "no model given"),
    (("sparsify", "demo", "--frob", "1"), "No such option"),
    (("sparsify", "demo", "--steps"), "requires an argument"),
    (("sparsify", "demo", "--steps", "abc"), "--steps"),
    (("sparsify", "demo", "--steps", "0"), "train.steps"),
    (("sparsify", "demo", "--time", "1m", "--steps", "5"), "leave out --steps"),
    (("sparsify", "demo", "--time", "60"), "train.time"),
    (("sparsify", "demo", "--micro-batch-size", "most"), "train.micro_batch_size"),
    (("sparsify", "demo", "--lr", "-1"), "train.learning_rate"),
    (("sparsify", "demo", "--target-density", "0"), "constraint.target_density"),
    (("sparsify", "demo", "--target-density", "1.5"), "constraint.target_density"),
    (("sparsify", "demo", "--target-density", "nan"), "constraint.target_density"),
    (("sparsify", "demo", "--tolerance", "0"), "constraint.tolerance"),
    (("sparsify", "demo", "--scope", "some"), "train.scope"),
    (("sparsify", "demo", "--frontier", "5,x"), "--frontier: numbers between commas"),
    (("sparsify", "demo", "--frontier", "1,5"), "the densities have to fall"),
    (("sparsify", "demo", "--frontier", "5,1", "--constraint", "kl"), "frontier needs kind density"),
    (("sparsify", "demo", "--frontier", "5,1", "--target-density", "0.1"), "leave out --target-density"),
    (("sparsify", "demo", "--weights", "1,2"), "weights: 2 for 1 sources"),
    (("sparsify", "demo", "--match", "-1"), "train.match"),
    (("sparsify", "demo", "--lora-targets", "mlp"), "train.lora_targets"),
    (("sparsify", "--finish", "model"), "nothing to resume"),
    (("sparsify", "--finish", "model", "--resume", "model"), "leave out --resume"),
    (("sparsify", "model", "--data", "text.txt"), "exists and is not empty"),
    (("sparsify", "demo", "--out", "text.txt"), "is a file"),
    (("sparsify", "demo", "--out", "text.txt/sub"), "not writable"),
    (("sparsify", "--resume", "model"), "nothing to resume"),
    (("sparsify", "--resume", "model-attnprune"), "has finished"),
    (("sparsify", "demo", "--config", "missing.toml"), "missing.toml"),
    (("inspect", "nowhere"), "no such file"),
    (("inspect", "text.txt"), "not a sidecar folder"),
    (("inspect", "model"), "no attnprune.json"),
    (("inspect", "model-attnprune", "--text", "a", "--layer", "9"), "--layer"),
    (("eval", "model"), "say what to measure on"),
    (("apply", "a", "b", "c"), "takes a base and a sidecar"),
    (("apply", "a", "b", "--base", "c"), "is named as the base already"),
    (("apply", "model-attnprune", "--merge", "model"), "exists and is not empty"),
    (("sparsify", "demo", "--out", "missing/../text.txt"), "is a file"),
    (("inspect", "a\x1b[31mb"), "a\\x1b[31mb"),
]


@pytest.mark.parametrize(("arguments", "message"), QUICK, ids=lambda value: " ".join(value)[:40])
def test_bad_input_is_refused_before_anything_heavy(place, arguments, message):
    refused(place, *arguments, message=message)


SLOWER = [
    (("sparsify", "./nowhere", "--out", "x"), 2, "no such folder"),
    (("sparsify", "some/model", "--out", "x", "--data", "text.txt"), 1, "the Hub cannot be reached"),
    (("sparsify", "model", "--out", "x"), 1, "--data self"),
    (("sparsify", "model", "--out", "x", "--data", "empty.txt"), 2, "is empty"),
    (("sparsify", "model", "--out", "x", "--data", "binary.txt"), 2, "line 1"),
    (("sparsify", "model", "--out", "x", "--data", "short.txt"), 2, "shorter than one block"),
    (("sparsify", "model", "--out", "x", "--data", "text.txt", "--seq-len", "65"), 2, "context of 64"),
    (("sparsify", "model", "--out", "x", "--data", "text.txt", "--device", "cuda"), 2, "no CUDA device"),
    (("sparsify", "demo", "--out", "x", "--data", "text.txt"), 2, "its own task"),
    (("eval", "model", "--data", "text.txt", "--device", "cuda"), 2, "no CUDA device"),
    (("sparsify", "bloom", "--out", "x", "--data", "text.txt"), 2, "bloom: this model family is not supported"),
    (("sparsify", "model-attnprune", "--out", "x"), 2, "this is a sidecar"),
    (("sparsify", "pickle", "--out", "x"), 2, "no safetensors weights"),
    (("sparsify", "broken.gguf", "--out", "x"), 2, "cannot read this GGUF"),
    (("apply", "other", "model-attnprune"), 2, "not the weights"),
    (("apply", "wider", "model-attnprune"), 2, "wrong base"),
    (("inspect", "model-attnprune", "--base", "model", "--text", "a" * 65), 2, "more than the 64"),
    (("inspect", "model-attnprune", "--base", "model", "--text", "caf\udce9"), 2, "--text: is not UTF-8 text"),
    (("eval", "model", "--data", "text.txt", "--seq-len", "65"), 2, "context of 64"),
    (("eval", "model", "--data", "latin1.txt"), 2, "latin1.txt: line 1: not UTF-8 text"),
    (("sparsify", "model", "--config", "latin1.txt"), 2, "latin1.txt: not UTF-8 text"),
]


@pytest.fixture(scope="module")
def bad_inputs(place):
    (place / "empty.txt").touch()
    (place / "binary.txt").write_bytes(b"\0\1\2")
    (place / "short.txt").write_text("tiny")
    (place / "latin1.txt").write_bytes(b"caf\xe9")
    (place / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    (place / "bloom").mkdir()
    (place / "bloom" / "config.json").write_text('{"model_type": "bloom"}')
    (place / "bloom" / "model.safetensors").write_bytes(b"")
    (place / "pickle").mkdir()
    (place / "pickle" / "config.json").write_text('{"model_type": "llama"}')
    (place / "pickle" / "pytorch_model.bin").write_bytes(b"")
    save_tiny_llama(place / "other", seed=1)
    save_tiny_llama(place / "wider", num_attention_heads=8)
    return place


@pytest.mark.parametrize(("arguments", "code", "message"), SLOWER, ids=lambda value: str(value)[:60])
def test_bad_model_data_or_base_is_refused(bad_inputs, arguments, code, message):
    refused(bad_inputs, *arguments, code=code, message=message)


def test_unknown_config_key_names_the_nearest(place, tmp_path):
    (tmp_path / "run.toml").write_text("[train]\nlerning_rate = 1e-3\n")
    refused(place, "sparsify", "demo", "--config", tmp_path / "run.toml", message="did you mean 'learning_rate'?")


def test_error_with_json_is_one_object_on_stdout(place):
    done = attnprune("inspect", "nowhere", "--json", cwd=place)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["exit_code"] == 2


def test_inspect_shows_and_dumps(place):
    shown = attnprune("inspect", "model-attnprune", cwd=place)
    assert shown.returncode == 0
    for part in ("density of each head", "constraint", "open share by distance"):
        assert part in shown.stdout
    data = json.loads(attnprune("inspect", "model-attnprune", "--json", cwd=place).stdout)
    assert data["manifest"]["format_version"] == "1.3"
    assert [len(layer) for layer in data["density"]] == [4, 4]


def test_inspect_text_lists_open_edges(place):
    arguments = ("inspect", "model-attnprune", "--base", "model", "--text", "the gate", "--layer", "1")
    data = json.loads(attnprune(*arguments, "--json", cwd=place).stdout)
    assert data["tokens"] == list("the gate")
    assert data["edges"]
    assert all(e["layer"] == 1 and 0 <= e["key"] <= e["query"] < 8 and 0 < e["weight"] <= 1 for e in data["edges"])
    shown = attnprune(*arguments, cwd=place, PYTHONIOENCODING="utf-8").stdout
    assert "←" in shown
    assert "[/]" not in shown


def test_eval_reproduces_the_manifest(place):
    data = json.loads(attnprune("eval", "model-attnprune", "--base", "model", "--json", cwd=place).stdout)
    [report] = data["reports"]
    assert data["reproduced"] is True
    result = json.loads((place / "model-attnprune" / "attnprune.json").read_text())["result"]
    for key in ("loss", "open_edges", "visible_edges", "base_loss", "control_loss", "kl", "density", "edges_per_query"):
        assert report[key] == result[key]


def test_eval_of_a_base_model(place):
    data = json.loads(attnprune("eval", "model", "--data", "text.txt", "--seq-len", 16, "--json", cwd=place).stdout)
    assert data["reports"][0]["loss"] > 0
    assert data["reports"][0]["density"] is None


def test_apply_merge_writes_a_folder_that_loads_without_attnprune(place, tmp_path):
    done = attnprune("apply", "model", "model-attnprune", "--merge", tmp_path / "merged", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    program = f"""
import sys
sys.modules["attnprune"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "merged")!r}, trust_remote_code=True)
ids = torch.tensor([{json.loads((place / "model-attnprune" / "attnprune.json").read_text())["probe"]["input_ids"]}])
print(model(input_ids=ids, labels=ids).loss.item(), len(tokenizer))
"""
    env = ENVIRONMENT | {"HF_HOME": str(tmp_path / "home")}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert abs(float(run.stdout.split()[0]) - facts["probe_loss"]) < 1e-5
    plain = "from transformers import AutoModelForCausalLM as A; A.from_pretrained({!r})".format(
        str(tmp_path / "merged")
    )
    refused_run = subprocess.run(
        [sys.executable, "-c", plain], env=env, capture_output=True, input="", text=True, check=False
    )
    assert refused_run.returncode != 0


def test_dry_run_prints_the_plan_and_writes_nothing(place):
    before = listing(place)
    done = attnprune("sparsify", "model", "--data", "text.txt", "--out", "a/b/dry", "--dry-run", *TINY, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "per 1,000 steps" in done.stderr
    assert listing(place) == before


@pytest.mark.parametrize(
    "arguments",
    [["LONG"], ["model", "--data", "LONG"], ["model", "--init", "LONG"], ["model", "--out", "LONG"]],
    ids=["model", "data", "init", "out"],
)
def test_a_name_too_long_for_the_file_system_is_bad_input(place, arguments):
    before = listing(place)
    long = ["x" * 300 if argument == "LONG" else argument for argument in arguments]
    done = attnprune(
        "sparsify", "--data", "text.txt", "--out", "new", *long, *TINY, cwd=place
    )  # the last of each counts
    assert done.returncode == 2, done.stderr
    assert "file name too long" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert listing(place) == before


@pytest.mark.parametrize("option", ["--tolerance", "--target-density"])
def test_constraint_not_met_exits_3_and_keeps_the_result(place, tmp_path, option):
    tight = [*TINY, option, "1e-9", "--steps", "4", "--out", tmp_path / "run", "--json"]
    done = attnprune("sparsify", "model", "--data", "text.txt", *tight, cwd=place)
    assert done.returncode == 3
    assert json.loads(done.stdout)["manifest"]["result"]["feasible"] is False  # one object, the result
    assert "does not hold" in done.stderr.splitlines()[-1]
    assert f"a larger {option}" in done.stderr.splitlines()[-1]
    assert (tmp_path / "run" / "attnprune.json").exists()


def test_run_toml_repeats_the_run(place, tmp_path):
    done = attnprune("sparsify", "--config", "model-attnprune/run.toml", "--out", tmp_path / "again", cwd=place)
    assert done.returncode == 0, done.stderr
    for name in ("gates.safetensors", "delta.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (place / "model-attnprune" / name).read_bytes()


def test_a_frontier_is_written_shown_and_drawn(place, tmp_path):
    out = tmp_path / "run"
    arguments = ("sparsify", "model", "--data", "text.txt", *TINY, "--frontier", "90,80", "--steps", 8, "--out", out)
    done = attnprune(*arguments, "--json", cwd=place)
    assert done.returncode in (0, 3), done.stderr  # 8 steps of a toy
    assert [point["folder"] for point in json.loads(done.stdout)["frontier"]] == ["frontier/90", "."]
    with Image.open(out / "frontier.png") as picture:
        assert picture.width > 500
    for folder, place_of in ((out / "frontier/90", 0), (out, 1)):
        shown = json.loads(attnprune("inspect", folder, "--json", cwd=place).stdout)
        assert shown["place"] == place_of
        lines = attnprune("inspect", folder, cwd=place).stdout.splitlines()
        marked = [line.split()[1] for line in lines if line.lstrip().startswith("▶")]
        assert marked == [shown["frontier"][place_of]["folder"]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_prints_the_resume_command_that_finishes_the_run(place, tmp_path, number, code):
    out = tmp_path / "run"
    arguments = ["sparsify", "model", "--data", "text.txt", "--steps", "4000", "--out", str(out), *TINY]
    process = subprocess.Popen(
        [sys.executable, "-m", "attnprune", *arguments], cwd=place, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while not list(out.glob("checkpoints/checkpoint-*/attnprune_seal.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    last = stderr.strip().splitlines()[-1]
    assert process.returncode == code, stderr
    assert f"attnprune sparsify --resume {out}" in last
    refused(place, *arguments, message="holds an unfinished run")
    refused(place, "sparsify", "--resume", out, "--seed", "5", message="train.seed: 5 differs")
    done = attnprune("sparsify", "--finish", out, cwd=place)
    assert done.returncode in (0, 3), done.stderr  # by the steps that were done
    assert (out / "attnprune.json").exists()


def test_disk_full_is_one_line_and_keeps_the_good_checkpoint(place, tmp_path):
    """A file-size limit stands in for a full disk: the write fails with an OSError in the middle of a save."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); " \
            "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
            "sys.argv[0] = 'attnprune'; from attnprune.cli.app import main; main()"  # fmt: skip
    command = [sys.executable, "-c", limit, "sparsify", "model", "--data", "text.txt", "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, *TINY], cwd=place, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "attnprune.json").exists()


def test_closed_stdout_is_no_traceback(place):
    command = f"{sys.executable} -m attnprune inspect model-attnprune --json | head -c 1"
    done = subprocess.run(command, shell=True, cwd=place, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], 0.5), (["inspect", "model-attnprune"], 1.0)])
def test_light_commands_import_neither_torch_nor_transformers(place, arguments, limit):
    program = (
        "import sys; from attnprune.cli.app import run; sys.argv = ['attnprune', *sys.argv[1:]]; code = run(); "
        "sys.exit(code or int(any(name in sys.modules for name in ('torch', 'transformers'))) * 9)"
    )
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=place, env=ENVIRONMENT, check=False)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
    print(f"median {statistics.median(times):.3f} s, goal {limit} s")  # a benchmark, not an assertion: see the README


class PanicException(BaseException):
    """As that of Rust code, which is no Exception."""


def test_a_panic_is_one_line(monkeypatch, capsys):
    def panics(**_):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(app, "app", panics)
    monkeypatch.setattr(app, "_quiet_libraries", lambda: None)  # they stay loud for the other tests
    assert app.run() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "attnprune: internal error: PanicException: index out of bounds (ATTNPRUNE_DEBUG=1 shows where)"
