"""`attnprune eval --tasks`: lm-eval on base, sparse model and open gates, with a task of our own, offline."""

from __future__ import annotations

import json

import pytest
import torch

from attnprune.sidecar import bases
from attnprune.training import harness
from tests.helpers.command import attnprune
from tests.helpers.factory import byte_tokenizer, refused, save_tiny_llama
from tests.helpers.sidecars import save_sidecar

TASK = """task: which_letter
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROWS = [
    {"text": f"{word} is a", "choices": ["b", "z"], "answer": n % 2} for n, word in enumerate(["one", "two", "three"])
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a sidecar of it, and a folder with a task."""
    folder = tmp_path_factory.mktemp("tasks")
    base = save_tiny_llama(folder / "model")
    save_sidecar(folder / "sparse", base, biases=[[-1000.0] * 4] * 2)  # nothing is open
    (folder / "tasks").mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tasks" / "which.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return folder


def chosen(model, tokenizer, text, choices):
    """The choice that the model finds likeliest, by its own log-probabilities."""
    sums = []
    for choice in choices:
        ids = torch.tensor([tokenizer(text + choice)["input_ids"]])
        start = len(tokenizer(text)["input_ids"])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        sums.append(sum(log_p[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])))
    return sums.index(max(sums))


def test_three_models_side_by_side(place):
    arguments = ("--base", "model", "--tasks", "which_letter", "--task-folder", "tasks")
    done = attnprune("eval", "sparse", *arguments, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["tasks"]
    assert list(found) == ["base", "open gates", "sparse"]
    base = bases.load_base(str(place / "model"))
    right = [chosen(base.model, base.tokenizer, r["text"], r["choices"]) == r["answer"] for r in ROWS]
    for model in ("base", "open gates"):  # gates alone were added, so open ones are the base
        [score] = found[model]
        assert (score["task"], score["metric"]) == ("which_letter", "acc")
        assert score["value"] == pytest.approx(sum(right) / len(ROWS))
        assert score["error"] is not None
    shown = attnprune("eval", "sparse", *arguments, cwd=place, COLUMNS="80").stdout
    assert "which_letter" in shown
    assert " ± " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "which_letter,no_such_task", "--task-folder", "tasks"), "lm-eval has no task 'no_such_task'"),
        (("--tasks", "which_letter", "--task-folder", "gone"), "gone: no such folder"),
        (("--tasks", "which_letter", "--data", "rows.jsonl"), "brings its own text"),
    ],
)
def test_bad_input_is_one_line(place, arguments, message):
    done = attnprune("eval", "sparse", "--base", "model", *arguments, cwd=place)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


SUMS = [{"text": text, "choices": ["046", "111"], "answer": 0} for text in ("#12+34=", "")]
SPOKEN = """task: spoken
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_text: "#12+34="
doc_to_target: "0 4 6"
generation_kwargs:
  max_gen_toks: 3
  until: []
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def sums(tmp_path, monkeypatch):
    """A folder that is no git repository, with two tasks for the bundled model; lm-eval knows no others."""
    from lm_eval.tasks import TaskManager

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    (tmp_path / "sums.yaml").write_text(TASK.format(rows=rows) + "target_delimiter: ''\n")
    (tmp_path / "spoken.yaml").write_text(SPOKEN.format(rows=rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "_manager", lambda folder: TaskManager(include_path=folder, include_defaults=False))
    return str(tmp_path)


def test_a_tokenizer_without_an_end_of_text(sums, capfd):
    """The bundled model's: the padding token stands for it, openly, also before the text that has no prompt."""
    notes = []
    options = {"definitions": sums, "bars": False, "on_note": notes.append}
    found = harness.evaluate_tasks("demo", None, ["which_letter", "spoken"], **options)["model"]
    assert capfd.readouterr().err == ""  # neither bars nor what git says of the folder
    assert [note for note in notes if "'<pad>'" in note] == notes != []
    base = bases.load_base("demo")
    right = [chosen(base.model, base.tokenizer, row["text"] or "<pad>", row["choices"]) == 0 for row in SUMS]
    scores = {score.task: score.value for score in found}
    assert scores == {"which_letter": pytest.approx(sum(right) / 2), "spoken": 1.0}
    assert base.tokenizer.eos_token is None


def test_without_any_token_that_could_end_a_text(sums):
    bare = byte_tokenizer()
    bare.eos_token = None
    refused(lambda: harness._with_an_end(bare, print), "no token for the begin or end of a text")
