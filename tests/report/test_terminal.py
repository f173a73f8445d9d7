"""What people see on a terminal: 80 columns, no colour, many heads; and results that are none are loud."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from attnprune.errors import printable
from attnprune.measure import Report
from attnprune.report import edge_index
from attnprune.report.edges import render, summary
from attnprune.report.evaluation import report_data, warnings_of
from attnprune.report.grid import HeadGrid
from attnprune.report.progress import display
from attnprune.report.sidecar import verdict_lines
from attnprune.report.traces import sets_table
from attnprune.sidecar.edges import Edge, TextEdges
from attnprune.units import counted
from tests.helpers.traces import model_trace, trace_of


def lines(*renderables, width=80):
    console = Console(file=StringIO(), width=width, color_system=None, soft_wrap=True, highlight=False)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("heads", [1, 4, 9, 12, 16, 32, 40])
def test_the_grid_fits_and_tells_classes_apart_without_colour(heads, width):
    values = [0.0, 0.001, 0.02, 0.2, 0.9, 0.00001]
    density = [np.resize(np.roll(values, layer), heads).astype(np.float32) for layer in range(len(values))]
    shown = lines(HeadGrid(density), width=width)
    assert len(shown) == 3 + len(values)
    assert max(map(len, shown)) <= width
    rows = [row[6:] for row in shown[2:-1]]
    cell = 4 if heads * 4 + 6 <= width else 2 if heads * 2 + 22 <= width else 1
    first = {float(np.float32(values[-layer % 6])): rows[layer][:cell].strip() for layer in range(6)}
    closed, tiny, some = first[0.0], first[float(np.float32(0.001))], first[float(np.float32(0.02))]
    assert len({closed, tiny, some}) == 3
    assert closed == "·"
    if cell == 4:
        assert [first[float(np.float32(v))] for v in values] == ["·", ".10", "2.0", "20", "90", "≈0"]
    assert "closed" in shown[-1]
    assert cell == 4 or "< 0.3 %" in shown[-1]


def test_columns_of_the_grid_stand_under_their_heads():
    density = [np.full(32, 0.5, np.float32)]
    density[0][24] = 0.0
    _, names, row, _ = lines(HeadGrid(density))
    assert row[names.index("24")] == "·"
    assert row.count("·") == 1
    assert row.split()[-2:] == ["48", "1"]


EVALUATION = {
    "eval_density": 0.13, "eval_loss": 3.0452, "eval_base_loss": 3.0, "eval_kl": 0.11, "eval_feasible": False,
    "eval_edges_per_query": 2.0, "eval_value": 0.11, "eval_limit": 0.12, "eval_settled": 2700,
}  # fmt: skip


def line_of(step, **changes):
    console = Console(file=StringIO(), width=200, color_system=None)
    shown = display(console, live=False, quiet=False, steps=3000)
    shown.history.append((0.0, 0))
    shown.on_log(None, SimpleNamespace(global_step=step), None, logs=EVALUATION | changes)
    return console.file.getvalue()


def test_a_line_of_progress_tells_loss_base_and_gap():
    assert "loss 3.0452, base 3.0000, gap +0.0452" in line_of(300)


@pytest.mark.parametrize(
    ("step", "changes", "part"),
    [
        (300, {}, "over the limit, as planned until step 2,700"),
        (300, {"eval_value": 0.13}, "over the limit  "),
        (2700, {"eval_limit": 0.05}, "over the limit  "),
        (300, {"eval_feasible": True}, "within the limit"),
    ],
)
def test_over_the_limit_says_whether_that_is_planned(step, changes, part):
    assert part in line_of(step, **changes)


def report(**changes):
    values = {"loss": 1.0, "density": 0.5, "open_edges": 5, "visible_edges": 10, "data": "text"}
    return Report(**values | changes)


@pytest.mark.parametrize(
    ("open_edges", "word"), [(0, "NOTHING IS OPEN: 0 %"), (10, "EVERYTHING IS OPEN: 100 %"), (5, None)]
)
def test_all_closed_and_all_open_are_loud(open_edges, word):
    found = warnings_of([report(open_edges=open_edges)])
    assert [line.startswith(f"text: {word}") for line in found] == ([True] if word else [])
    result = SimpleNamespace(open_edges=open_edges, visible_edges=10, feasible=True)
    assert [line.startswith(str(word)) for line in verdict_lines(result)] == ([True] if word else [])


def test_shares_of_next_to_nothing_are_no_numbers():
    """Where closing everything hardly changes a prediction, a share can be any number."""
    model = model_trace(3, 10)
    model["random"] |= {"share": -1089.6, "share_low": -4363.81, "share_high": 0.99}
    model["complement"]["share"] = -17.7
    table = "\n".join(lines(sets_table(trace_of(model))))
    assert "< -10 [< -10, 0.99]" in table
    assert "-17.7" not in table
    assert "0.910" in table


def test_json_has_no_exact_match_where_none_was_measured():
    assert "exact_match" not in report_data(report())
    assert report_data(report(exact_match=0.0))["exact_match"] == 0.0


EDGES = [
    *(Edge(0, 0, q, q, 0.5) for q in range(6)),
    *(Edge(0, 1, q, 0, 0.9) for q in range(1, 6)),
    *(Edge(1, 0, q, q - 1, 0.2) for q in range(1, 6)),
    *(Edge(layer, 3, 5, 1, 0.01) for layer in range(2, 16)),
]
TEXT = TextEdges([1, 2, 3, 4, 5, 6], ["a", " b", "[red]", "\n", "e", "f"], EDGES, visible=21 * 4 * 16)
RESULT = SimpleNamespace(density=0.0042, seq_len=512)


def test_the_summary_of_a_text_ranks_heads_and_names_lengths():
    shown = lines(*summary(TEXT, RESULT), width=140)
    assert shown[0] == "6 tokens, 30 of 1,344 edges open (2.23 % at T = 6)"
    assert shown[1].startswith("of these 1-4 back 60 %, self 20 %, first token 20 %")
    assert "0.42 % at T = 512" in shown[2]
    assert all(len(line) <= 80 for line in lines(*summary(TEXT, RESULT)))
    heads = [line.split()[0] for line in shown if line.strip()[:1].isdigit() and "." in line.split()[0]]
    assert heads[:3] == ["1.0", "2.3", "3.3"]  # neither own tokens nor the first, however many and heavy
    assert len(heads) == 12
    assert "1-4 back 80 %" in next(line for line in shown if line.split()[:1] == ["1.0"])
    assert any(line.startswith("and 5 more heads") and "--all" in line for line in shown)
    assert all("[red]" in line or "[" not in line for line in shown)


def test_all_lists_every_head():
    shown = lines(*render(TEXT, EDGES, limit=2), width=140)
    assert sum("←" in line for line in shown) == 18  # 17 heads and the title
    assert "+4" in next(line for line in shown if line.split()[:1] == ["0.0"])


def test_one_thing_is_not_many():
    assert [counted(n, "block") for n in (0, 1, 2, 2000)] == ["0 blocks", "1 block", "2 blocks", "2,000 blocks"]


def test_a_line_is_cut_between_characters_with_their_escapes():
    text = "a\x1b\u202eb\udcff"
    whole = r"a\x1b\u202eb\udcff"
    assert printable(text) == printable(text, len(whole)) == whole
    cuts = {printable(text, limit) for limit in range(1, len(whole))}
    assert cuts == {"…", "a…", r"a\x1b…", r"a\x1b\u202e…", r"a\x1b\u202eb…"}


@pytest.mark.parametrize("width", [80, 140])
def test_a_long_token_gives_way_and_no_number(width):
    rows = [{"layer": 29, "head": 8, "text": "x" * 300, "token": 1, "count": 123_456_789, "weight": 123_456_789.0}]
    contexts = [{"layer": 29, "head": 8, "block": 1_000, "weight": 0.5, "text": "«a» ⟦b⟧"}]
    passing = {"count": 123_456_789, "weight": 123_456_789.0}
    data = {"model": "m", "data": "d", "blocks": 1, "blocks_in_all": 1, "total": passing, "passing": passing,
            "heads": rows, "keys": rows, "queries": rows, "contexts": contexts, "notes": [],
            "more": {"heads": 0, "keys": 0, "queries": 7}}  # fmt: skip
    console = Console(width=width, record=True, force_terminal=False)
    console.print(*edge_index.render(data), sep="\n")
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert sum("123,456,789  100 %  123,456,789.0  100 %" in line for line in lines) == 3
    assert sum("xxx…" in line for line in lines) == 2
    assert sum("+7 more" in line for line in lines) == 1
