"""`eval --damage`, `inspect --damage` and `sparsify --recover` as a person meets them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests.helpers.command import ENVIRONMENT, attnprune, listing
from tests.helpers.factory import save_text, save_tiny_llama
from tests.helpers.paths import EXAMPLES
from tests.helpers.sidecars import save_sidecar
from tests.training.test_damage import planted


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a text, and two sidecars: one with a head closed by hand, measured, and another one."""
    folder = tmp_path_factory.mktemp("damage")
    base = save_tiny_llama(folder / "model")
    save_text(folder / "text.txt")
    save_sidecar(folder / "sparse", base, biases=planted())
    save_sidecar(folder / "other", base, "lora")
    measured = ("eval", "sparse", "--base", "model", "--data", "text.txt", "--tokens", 320, "--damage")
    done = attnprune(*measured, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["worst_layers"] == [1]
    return folder


def refused(place, *arguments, message):
    before = listing(place)
    done = attnprune(*arguments, cwd=place)
    assert done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if "loading" not in line and "reading" not in line] == [
        line for line in done.stderr.splitlines() if line.startswith("attnprune:")
    ]
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert listing(place) == before


@pytest.mark.parametrize("columns", [80, 140])
def test_inspect_shows_the_worst_first_within_the_terminal(place, columns):
    done = attnprune("inspect", "sparse", "--damage", cwd=place, COLUMNS=str(columns))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert "…" not in done.stdout
    layers, heads = done.stdout.split("heads (of 8)")
    rows = [line.split() for line in layers.splitlines() if line.count("%") == 3]
    assert [row[0] for row in rows] == ["1", "0"]
    first = next(line for line in heads.splitlines() if line.strip().startswith("1."))
    assert first.split()[0] == "1.2"


def test_the_committed_record_is_of_the_committed_sidecar(tmp_path):
    done = attnprune("inspect", EXAMPLES / "smollm2-half", "--damage", cwd=tmp_path, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines[1:])) <= 80  # the first names the folder
    assert "16 of 30 layers" in done.stdout
    assert "16 heads (of 270)" in done.stdout


def test_inspect_as_json_is_the_record_and_its_rankings(place):
    data = json.loads(attnprune("inspect", "sparse", "--damage", "--json", cwd=place).stdout)
    assert data["damage"] == json.loads((place / "sparse" / "damage.json").read_text())
    assert data["layers"][0] == {"layer": 1, "kl_won": data["damage"]["kl"]}
    assert (data["heads"][0]["layer"], data["heads"][0]["head"]) == (1, 2)


def test_inspect_needs_no_torch(place):
    program = (
        "import sys; from attnprune.cli.app import run; sys.argv = ['attnprune', 'inspect', 'sparse', '--damage']; "
        "code = run(); sys.exit(code or int(any(name in sys.modules for name in ('torch', 'transformers'))) * 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=place, env=ENVIRONMENT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_everything_else_passes_the_file_by(place, tmp_path):
    for command in (("verify", "sparse", "--base", "model"), ("inspect", "sparse"), ("diff", "sparse", "sparse")):
        done = attnprune(*command, cwd=place)
        assert done.returncode == 0, done.stderr
    done = attnprune("apply", "model", "sparse", "--merge", tmp_path / "merged", cwd=place)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "merged" / "damage.json").exists()
    refused(place, "inspect", tmp_path / "merged", "--damage", message="is merged")
    shutil.copy(place / "sparse" / "damage.json", tmp_path / "merged")
    done = attnprune("verify", tmp_path / "merged", cwd=place)
    assert done.returncode == 0, done.stderr


def test_bad_input_is_one_line(place):
    text = ("--data", "text.txt", "--damage")
    refused(place, "eval", "sparse", *text, message="use --base MODEL")
    refused(place, "eval", "model", *text, message="is not a local sidecar")
    refused(place, "eval", "sparse", "--base", "model", "--damage", message="run.toml")
    refused(place, "eval", "sparse", *text, "--data", "text.txt", message="takes one --data")
    refused(place, "eval", "sparse", *text, "--base", "model", "--allow-base-mismatch", message="leave out")
    refused(place, "inspect", "other", "--damage", message="attnprune eval other --damage")
    shutil.copy(place / "sparse" / "damage.json", place / "other")
    refused(place, "inspect", "other", "--damage", message="is of another sidecar")
    (place / "other" / "damage.json").write_text("{")
    refused(place, "inspect", "other", "--damage", message="not valid JSON")
    (place / "other" / "damage.json").unlink()
    refused(place, "sparsify", "model", "--data", "text.txt", "--recover", "-o", "x", message="--init SIDECAR")


def test_recover_says_which_layers_in_the_plan(place):
    tiny = ("--seq-len", 16, "--eval-tokens", 160, "--batch-size", 4, "--scope", "attn", "--device", "cpu")
    run = ("sparsify", "model", "--data", "text.txt", "--init", "sparse", "--recover", "-o", "again", *tiny)
    done = attnprune(*run, "--dry-run", cwd=place)
    assert done.returncode == 0, done.stderr
    plan = " ".join(done.stderr.split())
    for part in ("only layers 1 of 2 train", "damage.json: text.txt", "the density is held"):
        assert part in plan
