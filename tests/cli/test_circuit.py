"""`attnprune circuit` as a person meets it: real subprocesses, exit codes, files, JSON, resuming."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from attnprune.circuit import mib
from attnprune.circuit.folder import read_settings
from attnprune.circuit.result import NOT_CLEAR, CircuitResult, not_shown
from tests.helpers.command import ENVIRONMENT, attnprune
from tests.helpers.factory import save_tiny_llama

COMMAND = [sys.executable, "-m", "attnprune", "circuit"]
ADDITION = ["demo", "--task", "addition", "--quick", "--prompts", "9", "--device", "cpu"]


def circuit(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    return attnprune("circuit", *arguments, cwd=cwd, timeout=240)


def first_object(text: str) -> dict:
    """The result; the line behind it says why the exit code is 3."""
    return json.JSONDecoder().raw_decode(text)[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random model and a finished search of the bundled one against itself."""
    folder = tmp_path_factory.mktemp("circuit")
    save_tiny_llama(folder / "model", max_position_embeddings=64)
    done = circuit(
        *ADDITION,
        "--against",
        "demo",
        "--mask-steps",
        "5",
        "--procedure",
        "published",
        "--levels",
        "--searches",
        "2",
        "--out",
        "found",
        "--json",
        "-q",
        cwd=folder,
    )
    assert done.returncode == 3, done.stderr
    (folder / "stderr.txt").write_text(done.stderr)
    (folder / "stdout.json").write_text(done.stdout)
    return folder


def test_json_is_the_file_and_matches_its_schema(place):
    printed = first_object((place / "stdout.json").read_text())
    assert printed == json.loads((place / "found" / "circuit.json").read_text())
    result = CircuitResult.model_validate(printed)
    one, other = result.models
    assert one.edges == other.edges
    assert result.compare.edges.value == 1
    assert result.compare.reasons == [not_shown("demo")] * 2 + [f"demo: its circuit is {NOT_CLEAR}"] * 2
    assert not one.controls.nonsense.clear  # nine prompts show nothing of the control either
    assert result.task.test == 9
    assert result.task.chance == 0.5
    assert len(one.test.each) == 9
    assert result.method.mask_steps == 5
    assert one.published.heads == other.published.heads > 0
    assert [(level.level, level.seed) for level in one.levels[:4]] == [
        ("edges", 0), ("nodes", 0), ("messages", 0), ("edges", 1)
    ]  # fmt: skip
    assert [(ratio.level, ratio.searches, ratio.value) for ratio in result.compare.levels] == [
        (level, 2, pytest.approx(1)) for level in ("edges", "nodes", "messages")
    ]
    assert result.compare.published.token_edges == 1
    assert result.task.more > 1000


def test_nine_prompts_show_nothing(place):
    """Whatever the circuit is: nine prompts at 1 would still allow a faithfulness of 0.7."""
    result = CircuitResult.model_validate_json((place / "found" / "circuit.json").read_text())
    assert not any(model.reached for model in result.models)
    *_, line = (place / "stderr.txt").read_text().splitlines()
    test = result.models[0].test
    assert line == (
        "attnprune: demo: finished and saved, but faithfulness 0.9 is not shown with 9 prompts: "
        f"{test.faithfulness.value:.3f} on them, with 95 % confidence above {test.lower:.3f} and below "
        f"{test.upper:.3f}, which must lie between 0.85 and 1.15 (try more --prompts, with another --out)"
    )


def test_files_of_a_search(place):
    names = {path.name for path in (place / "found").iterdir()}
    assert names >= {"circuit.json", "circuit.html", "eap-ig.json", "eap-ig-against.json", "cache"}
    edges = json.loads((place / "found" / "eap-ig.json").read_text())["edges"]
    assert len(edges) == 479


@pytest.mark.parametrize("kind", ["json", "pt"])
def test_a_circuit_of_another_tool_is_evaluated_exactly(place, kind):
    """The search's own circuit, as others would give it, on the same test prompts."""
    found = CircuitResult.model_validate_json((place / "found" / "circuit.json").read_text())
    file = place / "found" / f"eap-ig.{kind}"
    done = circuit("demo", "--task", "addition", "--prompts", "9", "--quick", "--edges", file, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    given = first_object(done.stdout)
    assert given["fingerprint"] == found.task.fingerprint or found.task.more  # the search drew more of them
    assert given["edges"] == given["given"] == found.models[0].counts.edges
    assert given["test"]["faithfulness"]["value"] == pytest.approx(found.models[0].test.faithfulness.value, abs=1e-4)


def test_a_search_is_a_submission_to_mib_and_submissions_are_evaluated(place):
    """The circuit's edges come first, so the sizes from its own on hold what it does."""
    found = CircuitResult.model_validate_json((place / "found" / "circuit.json").read_text()).models[0]
    (folder,) = (path for path in (place / "found" / "mib").iterdir() if path.name == "addition_demo")
    command = ("demo", "--task", "addition", "--prompts", "9", "--quick", "--edges", folder)
    done = circuit(*command, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    record = first_object(done.stdout)
    circuits = record["circuits"]
    assert [one["given"] for one in circuits] == [0, 0, 2, 4, 9, 23, 47, 95, 239]  # of 479
    assert all(one["edges"] <= one["given"] for one in circuits)
    assert circuits[0]["test"]["faithfulness"]["value"] == pytest.approx(0, abs=1e-4)
    larger = next(one for one in circuits if one["given"] >= found.counts.edges)
    assert larger["test"]["faithfulness"]["value"] > 0.5
    cpr, cmd = mib.areas([one["test"]["faithfulness"]["value"] for one in circuits])
    assert (record["cpr"], record["cmd"]) == pytest.approx((cpr, cmd))
    shown = circuit(*command, cwd=place)
    assert "50 %" in shown.stdout
    assert f"MIB's areas: CPR {cpr:.3f}, CMD {cmd:.3f}" in shown.stdout
    (place / "several").mkdir(exist_ok=True)
    for name in ("a.pt", "b.pt"):
        shutil.copy(place / "found" / "eap-ig.pt", place / "several" / name)
    several = circuit(*command[:-1], "several", "--json", cwd=place)
    assert several.returncode == 0, several.stderr
    assert (first_object(several.stdout)["cpr"], first_object(several.stdout)["cmd"]) == (None, None)
    assert "no nonsense control: it was not searched" in shown.stdout


def test_a_task_as_mib_publishes_it(tmp_path):
    """Sums of the bundled model in the layout of MIB's arithmetic; one row has no counterfactual."""
    rows = [
        {"prompt": f"#{a}+{b}=", "label": 0, "random_counterfactual": {"prompt": f"#{a + 60}+{b}=", "label": 1}}
        for a in range(20, 32)
        for b in range(45, 57)
    ]
    rows.append(rows[0] | {"random_counterfactual": None})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "sums.parquet")
    options = ("--task", "sums.parquet", "--quick", "--no-controls", "--prompts", "9", "--out", "found")
    done = circuit("demo", *options, cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    note = "sums.parquet: 1 of 145 rows do not fit this tokenizer"
    record = CircuitResult.model_validate_json((tmp_path / "found" / "circuit.json").read_text())
    assert record.notes == [note]
    assert (record.task.example.answers, record.task.example.wrong) == (["0"], ["1"])
    assert f"note: {note}" in done.stdout
    assert (tmp_path / "found" / "mib" / "sums_demo" / "importances.pt").exists()
    file = tmp_path / "found" / "eap-ig.pt"
    given = circuit("demo", "--task", "sums.parquet", "--quick", "--prompts", "9", "--edges", file, cwd=tmp_path)
    assert f"note: {note}" in given.stdout


def test_an_edge_is_explained_by_role_and_by_position(place):
    done = circuit("demo", "--task", "addition", "--explain", "a2.h1:END<-4", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for side in ("query", "key"):
        terms = sum(writer["value"] for writer in found[f"by_{side}"])
        assert terms + found[f"{side}_remainder"] == pytest.approx(found["score"], abs=1e-3)
        assert [writer["without"] is None for writer in found[f"by_{side}"]] == [False] * 5 + [True] * 6
    assert found["query"] == len(found["prompt"]) - 1
    shown = circuit("demo", "--task", "addition", "--explain", f"a2.h1:{found['query']}<-4", cwd=place)
    assert "written into the query" in shown.stdout
    assert f"score {found['score']:.3f}, a dense model, which has no gate: open" in shown.stdout


def test_a_finished_search_can_be_shown_again(place):
    before = CircuitResult.model_validate_json((place / "found" / "circuit.json").read_text())
    done = circuit("--resume", "found", cwd=place)
    assert done.returncode == 3, done.stderr
    assert "Smallest circuit found for faithfulness 0.9: addition" in done.stdout
    assert "not shown with 9 prompts" in done.stdout
    assert "chance" in done.stdout
    assert "random circuits" in done.stdout
    assert "nonsense answers" in done.stdout
    assert "open attention edges" in done.stdout
    after = CircuitResult.model_validate_json((place / "found" / "circuit.json").read_text())
    assert [model.edges for model in after.models] == [model.edges for model in before.models]
    assert after.command == before.command
    assert "--task addition" in after.command


def test_pictures_are_drawn_again_from_a_compressed_record(place, tmp_path):
    found = place / "found"
    (tmp_path / "circuit.json.gz").write_bytes(gzip.compress((found / "circuit.json").read_bytes()))
    done = circuit("--render", tmp_path, cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"written: {tmp_path / name}" for name in ("circuit.html", "curve.png")]
    for name in ("circuit.html", "curve.png"):
        assert (tmp_path / name).read_bytes() == (found / name).read_bytes()


def test_drawing_refuses_what_it_cannot_do(place, tmp_path):
    (tmp_path / "circuit.json").write_bytes((place / "found" / "circuit.json").read_bytes())
    (tmp_path / "circuit.html").mkdir()
    cases = [
        (["--render", tmp_path], "cannot write: is a directory"),
        (["--render", place], "holds no circuit.json and no circuit.json.gz"),
        (["demo", "--task", "addition", "--render", tmp_path], "leave out model, --task"),
        (["--render", tmp_path, "--resume", place / "found"], "leave out --resume"),
    ]
    for arguments, message in cases:
        done = circuit(*arguments, cwd=place)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circuit.html", "circuit.json"]


def test_a_record_with_numbers_that_no_search_ends_with_is_refused_and_nothing_is_drawn(place, tmp_path):
    record = json.loads((place / "found" / "circuit.json").read_text())
    record["method"]["band"] = []
    (tmp_path / "circuit.json").write_text(json.dumps(record))
    done = circuit("--render", tmp_path, cwd=place)
    assert done.returncode == 2
    assert done.stderr.startswith(f"attnprune: {tmp_path}: this record cannot be drawn: ")
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["circuit.json"]


def test_names_with_dollars_are_no_formulas(place, tmp_path):
    record = json.loads((place / "found" / "circuit.json").read_text())
    record["task"]["name"] = record["models"][0]["name"] = r"a$\frac{$b"
    (tmp_path / "circuit.json").write_text(json.dumps(record))
    done = circuit("--render", tmp_path, cwd=place)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_a_search_that_was_begun_before_there_were_masks_goes_on_without(place, tmp_path):
    settings = json.loads((place / "found" / "cache" / "settings.json").read_text())
    assert settings.pop("mask_steps") == 5
    del settings["ablate"], settings["procedure"], settings["levels"], settings["searches"]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "settings.json").write_text(json.dumps(settings))
    assert read_settings(tmp_path) == settings | {
        "mask_steps": 0,
        "ablate": "corrupt",
        "procedure": "exact",
        "levels": False,
        "searches": 1,
    }


def test_ctrl_c_says_how_to_go_on_and_going_on_works(place):
    arguments = [*ADDITION, "--no-controls", "--prompts", "12", "--out", "half"]
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    evaluations = place / "half" / "cache" / "evaluations.jsonl"
    while process.poll() is None and not (evaluations.exists() and len(evaluations.read_text().splitlines()) > 8):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1] == "attnprune: interrupted (continue with: attnprune circuit --resume half)"
    assert not (place / "half" / "circuit.json").exists()
    lines = evaluations.read_text().splitlines()
    done = circuit("--resume", "half", "--json", cwd=place)
    assert done.returncode == 3, done.stderr
    assert evaluations.read_text().splitlines()[: len(lines) - 1] == lines[:-1]
    assert first_object(done.stdout)["models"][0]["controls"]["random"] is None


def refused(place: Path, *arguments, message: str, code: int = 2) -> None:
    before = sorted(place.rglob("*"))
    done = circuit(*arguments, cwd=place)
    assert done.returncode == code, done.stderr
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no model given"),
        (("demo",), "no task given"),
        (("demo", "--task", "addition", "--target", "0"), "--target 0: is not above 0"),
        (("demo", "--task", "addition", "--target", "1.1"), "--target 1.1: is not above 0"),
        (("demo", "--task", "addition", "--out", "found"), "found: is not empty (attnprune circuit --resume found"),
        (("demo", "--task", "addition", "--out", "model/config.json"), "is not a folder"),
        (("--resume", "model"), "holds no search to continue"),
        (("demo", "--task", "addition", "--resume", "found"), "leave out model, --task"),
        (("--resume", "found", "--seed", "0", "-o", "other"), "leave out --seed, --out"),
        (("demo", "--task", "nonsense"), "nonsense: no such task"),
        (("demo", "--task", "addition", "--ablate", "noise"), "ablate noise: is none of corrupt, mean, zero, mixed"),
        (("demo", "--task", "addition", "--searches", "0"), "Invalid value for '--searches'"),
        (("demo", "--task", "addition", "--edges", "none.json"), "none.json: no such file"),
        (("demo", "--task", "addition", "--edges", "none.json", "--out", "x"), "leave out --out"),
        (("demo", "--task", "addition", "--explain", "a0.h0"), "a0.h0: is no edge HEAD:QUERY<-KEY"),
        (("demo", "--task", "addition", "--explain", "a0.h0:1<-3"), "a0.h0:1<-3: no such edge"),
        (
            ("demo", "--task", "addition", "--explain", "a0.h0:END<-S1"),
            "S1 is no position and no role (roles: =, END, ",
        ),
        (("demo", "--task", "addition", "--procedure", "no"), "procedure no: is none of exact, published"),
    ],
)
def test_bad_options_are_refused(place, arguments, message):
    refused(place, *arguments, message=message)


def test_another_graph_is_refused(place):
    refused(place, "demo", "--task", "addition", "--against", "model", message="--against model: has other layers")


def test_a_model_that_cannot_do_the_task_exits_1(place):
    done = circuit("model", "--task", "induction", "--prompts", "8", "--quick", "--out", "unable", cwd=place)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("attnprune: model: induction: this model cannot do the task")
    assert not (place / "unable" / "circuit.json").exists()
