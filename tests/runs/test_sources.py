"""The text of a run in its configuration: one source as a string, several as a list."""

from __future__ import annotations

import tomllib

import pytest

from attnprune.runs.config import build_config
from attnprune.runs.folder import output_folder, without_local_paths
from tests.helpers.factory import refused


def test_a_run_of_one_source_is_written_as_releases_read_it():
    for source in ("a.txt", ["a.txt"]):
        config = build_config({"data": {"source": source}})
        assert tomllib.loads(config.to_toml())["data"]["source"] == "a.txt"
        assert config.data.sources == ["a.txt"]


def test_several_sources_survive_toml():
    config = build_config({"data": {"source": ["a.txt", "org/set:sub"]}})
    assert build_config(tomllib.loads(config.to_toml())) == config
    assert config.data.sources == ["a.txt", "org/set:sub"]
    assert config.data.described == "a.txt + org/set:sub"


@pytest.mark.parametrize("value", [[], [1], None, {"a": 1}, ["a", None], [["a"]], 3])
def test_sources_that_are_no_names_are_refused(value):
    refused(lambda: build_config({"data": {"source": value}}), "data.source: a name or a list of names is needed")


def test_what_others_see_of_several_sources(tmp_path):
    (tmp_path / "a.txt").touch()
    named = [str(tmp_path / "a.txt"), str(tmp_path / "*.jsonl"), "org/set"]
    seen = without_local_paths(build_config({"data": {"source": named}}))
    assert build_config(tomllib.loads(seen.to_toml())).data.source == ["a.txt", "*.jsonl", "org/set"]
    assert without_local_paths(build_config({"data": {"source": named[:1]}})).data.source == "a.txt"


def test_the_default_folder_of_a_gguf_file():
    for name in ("x/M.gguf", "x/M.GGUF"):
        assert str(output_folder(build_config({"model": {"name": name}}))) == "M-attnprune"
