"""Every public function refuses what it cannot take in one line that names it, before it does anything."""

from __future__ import annotations

import inspect

import pytest
import torch

import attnprune as ap
from attnprune.api import circuits, commands
from attnprune.sidecar.folder import Sidecar
from tests.helpers.factory import byte_tokenizer, left, refused, save_tiny_llama

FUNCTIONS = {
    "sparsify": ap.sparsify, "evaluate": ap.evaluate, "circuit": commands.circuit, "diff": ap.diff, "merge": ap.merge,
    "verify": ap.verify, "push": ap.push, "load": ap.load, "trace": ap.trace, "atlas": ap.atlas, "index": ap.index,
    "open_index": ap.open_index, "open_sidecar": ap.open_sidecar, "attach": ap.attach, "detach": ap.detach,
    "masks": ap.masks, "close_heads": ap.close_heads, "open_gates": ap.open_gates, "lens.load": ap.lens.load,
    "circuit.explain": circuits.explain, "circuit.circuit_of_file": circuits.circuit_of_file,
    "Sidecar.read": Sidecar.read,
}  # fmt: skip
LEAST = {"seed": 0, "prompts": 0, "batch_size": 0, "seq_len": 0, "tokens": 1, "searches": 1, "explain": 0}
# Whatever this is, it is no name of a model, and text is that of tokens: the argument that is wrong is said first.
NEEDED = {"model": "demo", "text": "1+1", "task": "addition", "edge": "a0.h0:1<-0", "edges": "e", "a": "a", "b": "b",
          "repo": "a/b", "path": "p", "folder": "p", "out": "o", "data": "task", "heads": [(0, 0)], "name": "n",
          "ids": [1], "self": None}  # fmt: skip


class Odd:
    """Nothing that any function takes."""


def parameters():
    for function, found in FUNCTIONS.items():
        for name, parameter in inspect.signature(found).parameters.items():
            if name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
                yield function, name


def call(function, **given):
    found = FUNCTIONS[function]
    needed = {
        name: NEEDED[name]
        for name, parameter in inspect.signature(found).parameters.items()
        if (parameter.default is parameter.empty or name == "model") and parameter.kind is not parameter.VAR_KEYWORD
    }
    result = found(**needed | given)
    if hasattr(result, "__enter__"):
        with result:
            pass


@pytest.mark.parametrize(("function", "name"), parameters(), ids=lambda part: part)
def test_a_value_of_another_kind_is_refused(function, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: call(function, **{name: Odd()}))
    assert left(tmp_path) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_number_that_is_too_small_is_refused(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = inspect.signature(FUNCTIONS[function]).parameters
    for name, least in LEAST.items():
        if name in names and names[name].annotation in ("int", "int | None"):
            refused(lambda name=name, least=least: call(function, **{name: least - 1}), name)
            refused(lambda name=name: call(function, **{name: True}), f"{name}: True is not a whole number")
    if "seed" in names:
        refused(lambda: call(function, seed=2**32), "seed")
    assert left(tmp_path) == []


def test_what_is_meant_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = torch.nn.Linear(2, 2), byte_tokenizer()
    refused(lambda: ap.trace("demo", 12), "text: 12 is not text")
    refused(lambda: ap.trace("demo", "1+1", token="a"), "token: 'a' is not a whole number")
    refused(lambda: ap.atlas("demo", 5), "data: int is not text")
    refused(lambda: ap.attach(model), "attach: Linear is not a transformers model")
    refused(lambda: ap.attach("demo"), "attach: str is not")
    refused(lambda: ap.detach("demo"), "detach: str is not a model")
    hint = refused(lambda: ap.masks((model, tokenizer), [1]), "tuple is not a model").hint
    assert hint == "model, tokenizer = attnprune.load(path)"
    refused(lambda: ap.load("p", dtype="int8"), "dtype: 'int8' is not one of float32, ")
    refused(lambda: ap.load("p", device="gpu"), "device gpu: is not auto, cpu or cuda")
    refused(lambda: ap.load("p", device="cpu:1"), "device cpu:1: there is none")
    refused(lambda: ap.circuit("demo", "addition", resume="found"), "leave out model, task")
    for wrong in ({"train": {"steps": 0}}, {"train": 5}, {"trian": {}}):
        refused(lambda wrong=wrong: ap.RunConfig(**wrong), next(iter(wrong)))
    refused(lambda: ap.sparsify(ap.RunConfig(), data="text.txt", steps=3), "leave out steps, data")
    refused(lambda: ap.sparsify(ap.RunConfig(), dry_run=True), "leave out dry_run")


def test_names_of_training_alone_are_refused_where_heads_are_looked_at(tmp_path, monkeypatch):
    """Before a model is read, and without asking the Hub for a data set of this name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("few words")
    before = left(tmp_path)
    for read in (lambda data: ap.atlas("none", data), lambda data: ap.index("none", data, out="index")):
        for wrong, part in (
            ("self", "data self: is text that a model writes"),
            (("text.txt", "self"), "data self: is text that a model writes"),
            (("task", "text.txt"), "data task: is the bundled model's own text"),
        ):
            refused(lambda read=read, wrong=wrong: read(wrong), part)
    assert left(tmp_path) == before


def test_text_and_names_are_told_apart(tmp_path, monkeypatch):
    """A str is a name everywhere, a list of strings is text, a tuple is names."""
    monkeypatch.chdir(tmp_path)
    base = save_tiny_llama(tmp_path / "base")
    (tmp_path / "my text.txt").write_text("few words")
    before = left(tmp_path)
    for read in (
        lambda data: ap.sparsify(base, data=data, out="run", progress=False),
        lambda data: ap.atlas(base, data), lambda data: ap.index(base, data, out="index"),
        lambda data: ap.evaluate(base, data=data),
    ):  # fmt: skip
        for wrong, part in (
            ("just a text", "'just a text': a str names a file or data set, and there is none"),
            ("long " * 1000, "a str names a file or data set"),
            ("", "'': a str names a file"),
            (["few words", 5], "a list is the text itself, in strings (got int)"),
            ([tmp_path / "my text.txt"], "a list is the text itself, in strings (got PosixPath)"),
            (["my text.txt"], "'my text.txt' is a file"),
            ([], "data: is empty"),
            ([" ", "\n"], "data: holds no text"),
            ((), "data: a tuple names several"),
            ({"text": ["few"]}, "data: dict is not text"),
        ):
            refused(lambda read=read, wrong=wrong: read(wrong), part)
        refused(lambda read=read: read("my text.txt"), "shorter than one block")
        refused(lambda read=read: read("#27+58=085"), "#27+58=085: no such file, and no data set can have this name")
    for text in ("just a text", "#27+58=085"):
        assert "a list of strings is the text itself: data=[text]" in refused(lambda t=text: ap.atlas(base, t)).hint
    assert left(tmp_path) == before
