"""Settings on top of others, and those that have more than one form."""

import tomllib

import pytest

from attnprune.runs.config import build_config, merge, override
from attnprune.units import seconds


def test_merge_puts_the_leaves_of_the_second_on_top():
    base = {"train": {"steps": 1, "seed": 2}, "data": {"source": "a"}}
    override = {"train": {"steps": 5}, "output": {"folder": "x"}}
    assert merge(base, override) == {
        "train": {"steps": 5, "seed": 2},
        "data": {"source": "a"},
        "output": {"folder": "x"},
    }


def test_merge_changes_neither_argument():
    base, override = {"train": {"steps": 1, "seed": 2}}, {"train": {"steps": 5}}
    merge(base, override)
    assert base == {"train": {"steps": 1, "seed": 2}}
    assert override == {"train": {"steps": 5}}


@pytest.mark.parametrize(
    ("base", "override", "expected"),
    [
        ({}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": 2}, {"a": 2}),
        ({"a": 2}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": None}}}, {"a": {"b": {"c": None, "d": 2}}}),
    ],
)
def test_merge_of_mixed_depths(base, override, expected):
    assert merge(base, override) == expected


def test_flags_override_a_file():
    file = {"train": {"steps": 7, "seed": 3}}
    config = build_config(merge(file, {"train": {"steps": 9}}))
    assert (config.train.steps, config.train.seed) == (9, 3)


def test_steps_above_replace_a_time_below_and_the_other_way_round():
    file = {"train": {"time": "10m", "seed": 3}}
    assert override(file, {"train": {"steps": 9}}) == {"train": {"steps": 9, "seed": 3}}
    assert override({"train": {"steps": 7}}, {"train": {"time": "90s"}}) == {"train": {"time": "90s"}}
    assert override(file, {"train": {"seed": 4}}) == {"train": {"time": "10m", "seed": 4}}
    assert override({"train": 5}, {"train": {"time": "90s"}}) == {"train": {"time": "90s"}}
    assert override(file, {"train": 5}) == {"train": 5}
    assert file == {"train": {"time": "10m", "seed": 3}}


def test_a_number_of_blocks_may_be_text():
    """As the command line has it; 0, as older runs wrote it, still means all at once."""
    sizes = [
        build_config({"train": {"micro_batch_size": value}}).train.micro_batch_size for value in ("4", 4, "auto", 0)
    ]
    assert sizes == [4, 4, "auto", 0]


@pytest.mark.parametrize(
    ("text", "expected"), [("90s", 90), ("10m", 600), ("1h", 3600), ("1h30m", 5400), ("1h1m1s", 3661)]
)
def test_a_duration_in_seconds(text, expected):
    assert seconds(text) == expected


def test_an_unresolved_time_is_written_without_steps():
    written = tomllib.loads(build_config({"train": {"time": "10m"}}).to_toml())["train"]
    assert written["time"] == "10m"
    assert "steps" not in written
