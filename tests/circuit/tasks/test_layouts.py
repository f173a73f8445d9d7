"""Files of MIB and Edge-Pruning: small ones of the same layout give the prompts and answers that they mean."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from attnprune.circuit.tasks import load_task, words
from tests.helpers.factory import refused
from tests.helpers.tasks import all_batches, rows, word_tokenizer

NAMES = ["Mary", "John", "Anna", "Paul", "Lisa", "Mark", "Emma", "Jack", "Kate", "Adam"]
PAIRS = list(zip(NAMES, NAMES[1:] + NAMES[:1], strict=True))


def mib_ioi(io, s):
    return {
        "prompt": f"Then, {io} and {s} left, and {s} gave a book to", "template": "x",
        "metadata": {"indirect_object": io, "subject": s, "random_c": "Tom"}, "choices": [s, io], "answerKey": 1,
        "abc_counterfactual": {"prompt": "not this one", "choices": ["x"], "answerKey": 0},
        "s2_io_flip_counterfactual": {
            "prompt": f"Then, {io} and {s} left, and {io} gave a book to", "choices": [s, io], "answerKey": 0,
        },
    }  # fmt: skip


def mib_choice(io, s):
    def question(labels):
        ask = f"{io} has a book. Who has a book?\n{labels[0]}. {s}\n{labels[1]}. {io}\nAnswer:"
        return {"prompt": ask, "choices": {"label": labels, "text": [s, io]}, "answerKey": 1}

    return {**question(["A", "B"]), "symbol_counterfactual": question(["C", "D"])}


def mib_sum(a, b):
    return {
        "prompt": f"{a}+{b}=", "label": a + b, "operator": "+",
        "random_counterfactual": {"prompt": f"{a}+{b + 1}=", "label": a + b + 1, "operator": "+"},
    }  # fmt: skip


def pruning_ioi(io, s):
    return {
        "ioi_sentences": f"Then, {io} and {s} went home. {s} gave a book to {io}", "a": io, "b": s,
        "corr_ioi_sentences": f"Then, {io} and {s} went home. {io} gave a book to {s}",
    }  # fmt: skip


def pruning_gp(io, s):
    return {
        "prefix": f"So {io} is a friend of {s}, isn't", "pronoun": "she", "name": io,
        "corr_prefix": f"So {s} is a friend of {s}, isn't", "corr_pronoun": "he",
    }  # fmt: skip


def pruning_marked(io, s):
    return {
        "clean": f"It is {io}, not {s}; I saw <predict>{io}</predict> there", "split": "train",
        "corrupted": f"It is {s}, not {io}; I saw <predict>{s}</predict> there",
    }  # fmt: skip


LAYOUTS = [mib_ioi, mib_choice, pruning_ioi, pruning_gp, pruning_marked]
MEANT = {
    "mib_ioi": lambda io, s: (f" {io}", f" {s}"),
    "mib_choice": lambda io, s: ("B", "D"),
    "pruning_ioi": lambda io, s: (f" {io}", f" {s}"),
    "pruning_gp": lambda io, s: (" she", " he"),
    "pruning_marked": lambda io, s: (f" {io}", f" {s}"),
}


def save(file, made):
    """The rows in the file that its name says."""
    match file.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), file)
        case ".arrow":  # as datasets saves it
            table = pyarrow.Table.from_pylist(made)
            with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        case ".json":
            file.write_text(json.dumps(made))
        case _:
            file.write_text("\n".join(map(json.dumps, made)))
    return str(file)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "json", "jsonl"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_prompts_and_answers_are_those_that_the_benchmark_means(tmp_path, smol, layout, suffix):
    file = save(tmp_path / f"task.{suffix}", [layout(*names) for names in PAIRS])
    task = load_task(file, smol, count=10)
    assert (task.name, task.metric, task.notes) == (f"task.{suffix}", "logit_difference", ())
    found = rows(all_batches(task))
    assert len(found) == len(PAIRS)
    for batch, row in found:
        clean, corrupted = batch.texts[row]
        io, s = next(names for names in PAIRS if task_of(layout, names)[0] == clean)
        assert task_of(layout, (io, s)) == (clean, corrupted)
        answers = [smol.decode(side[row][side[row] >= 0]) for side in (batch.answers, batch.wrong)]
        assert tuple(answers) == MEANT[layout.__name__](io, s)


def task_of(layout, names):
    """(clean, corrupted) of a row, by the benchmark's own description."""
    io, s = names
    row = layout(io, s)
    match layout.__name__:
        case "mib_ioi":
            return row["prompt"], row["s2_io_flip_counterfactual"]["prompt"]
        case "mib_choice":
            return row["prompt"], row["symbol_counterfactual"]["prompt"]
        case "pruning_ioi":
            return (
                f"Then, {io} and {s} went home. {s} gave a book to",
                f"Then, {io} and {s} went home. {io} gave a book to",
            )
        case "pruning_gp":
            return row["prefix"], row["corr_prefix"]
    return f"It is {io}, not {s}; I saw", f"It is {s}, not {io}; I saw"


def test_years_of_edge_pruning(tmp_path):
    """Larger digits against smaller ones, neither against the year itself, by probability."""
    tokenizer = word_tokenizer()
    made = [
        {"prefix": f"The {words.EVENTS[0]} began in the year 17{year} and ended in the year 17", "digits": str(year),
         "corr_prefix": f"The {words.EVENTS[0]} began in the year 1701 and ended in the year 17"}
        for year in range(40, 50)
    ]  # fmt: skip
    task = load_task(save(tmp_path / "gt.arrow", made), tokenizer, count=5)
    assert task.metric == "probability_difference"
    for batch, row in rows(all_batches(task)):
        year = int(batch.texts[row][0].split()[6][2:])
        sides = [
            [tokenizer.decode(token) for token in side[row].tolist() if token >= 0]
            for side in (batch.answers, batch.wrong)
        ]
        assert sides == [[f"{n:02d}" for n in range(year + 1, 100)], [f"{n:02d}" for n in range(year)]]


def test_sums_of_mib(tmp_path):
    tokenizer = word_tokenizer(bos=False)
    made = [{**mib_sum(a, 20), "prompt": f"the {a} and 20 :", "random_counterfactual": {
        "prompt": f"the {a} and 21 :", "label": a + 21, "operator": "+"}} for a in range(30, 40)]  # fmt: skip
    made.append({**mib_sum(30, 20), "random_counterfactual": None})
    task = load_task(save(tmp_path / "sums.parquet", made), tokenizer, count=5)
    assert task.notes == ("sums.parquet: 1 of 11 rows do not fit this tokenizer",)
    for batch, row in rows(all_batches(task)):
        total = int(batch.texts[row][0].split()[1]) + 20
        assert [tokenizer.decode(side[row]) for side in (batch.answers, batch.wrong)] == [f"{total}", f"{total + 1}"]


def test_rows_that_do_not_fit_a_tokenizer_are_left_out_and_counted(tmp_path, smol):
    """A name of several tokens, and one that makes the prompts differ in length: MIB's own code leaves both out."""
    made = [mib_ioi(*names) for names in PAIRS]
    made.insert(3, mib_ioi("Xyzzyxq", "John"))
    longer = mib_ioi("Mary", "Paul")
    longer["s2_io_flip_counterfactual"]["prompt"] = "Then, Mary and Paul left, and Mary gave a blue book to"
    made.append(longer)
    task = load_task(save(tmp_path / "ioi.parquet", made), smol, count=10)
    assert task.notes == ("ioi.parquet: 2 of 12 rows do not fit this tokenizer",)
    assert len(rows(all_batches(task))) == len(PAIRS)
    refused(
        lambda: load_task(save(tmp_path / "none.json", [mib_ioi("Xyzzyxq", "John")]), smol),
        "none.json: none of its 1 rows fits this tokenizer; row 1: clean has ",
    )


def without(row, *columns):
    return {name: value for name, value in row.items() if name not in columns}


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (without(mib_ioi("Mary", "John"), "s2_io_flip_counterfactual"), "no s2_io_flip_counterfactual with a prompt"),
        ({**mib_ioi("Mary", "John"), "metadata": {"indirect_object": "Mary"}}, "subject is not text"),
        ({**mib_choice("Mary", "John"), "answerKey": 2}, "answerKey is no place among the labels"),
        ({**mib_choice("Mary", "John"), "symbol_counterfactual": None}, "no symbol_counterfactual with a prompt"),
        (without(mib_sum(1, 2), "label"), "label is neither a number nor text"),
        ({**mib_ioi("Mary", "John"), "prompt": 3}, "clean is not text"),
        (without(pruning_ioi("Mary", "John"), "corr_ioi_sentences"), "corr_ioi_sentences is not text"),
        ({**pruning_ioi("Mary", "John"), "a": "John"}, "ioi_sentences does not end in a ('John')"),
        (without(pruning_gp("Mary", "John"), "corr_pronoun"), "corr_pronoun is not text"),
        ({"prefix": "17", "corr_prefix": "18", "digits": "7x"}, "digits '7x' are not within 1 and 98"),
        ({"prefix": "17", "corr_prefix": "18", "digits": 99}, "digits '99' are not within"),
        ({**pruning_marked("Mary", "John"), "corrupted": "It is John"}, "no <predict> ... </predict>"),
    ],
)
def test_a_row_that_is_not_of_its_layout_is_refused(tmp_path, smol, row, part):
    refused(lambda: load_task(save(tmp_path / "t.jsonl", [row]), smol), "t.jsonl: line 1: ", part)


def test_files_that_are_not_what_their_name_says(tmp_path, smol):
    for name, content, part in [
        ("a.parquet", b"PAR1", "a.parquet: not a .parquet file, or a damaged one"),
        ("b.arrow", b"nothing", "b.arrow: not a .arrow file, or a damaged one"),
        ("c.json", b"[1, 2]", "c.json: not a JSON list of objects"),
        ("d.json", b'[{"clean": ', "d.json: not a JSON list of objects"),
        ("e.json", b"{", "e.json: line 1: not a JSON object"),
        ("f.json", b"[]", "f.json: 0 independent clean prompts"),
        ("g.parquet", None, "g.parquet: no such file"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        refused(lambda name=name: load_task(str(tmp_path / name), smol), part)
