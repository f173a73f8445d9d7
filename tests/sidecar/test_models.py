"""One loader for everything that looks at a model: by name, in memory, with its dense base; and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from datasets import Dataset

import attnprune as ap
from attnprune.sidecar import bases
from attnprune.sidecar.models import models_of
from tests.helpers.command import listing
from tests.helpers.factory import refused, save_text, save_tiny_llama
from tests.helpers.sidecars import save_merged, save_sidecar


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, a sidecar, a merged model, another model and a text."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_llama(folder / "base")
    save_tiny_llama(folder / "other", seed=5)
    save_sidecar(folder / "sidecar", folder / "base", "lora")
    save_merged(folder / "merged")
    save_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def loaded(place):
    return ap.load(place / "sidecar", str(place / "base"))


CALLS = {
    "trace": lambda model, place, **how: ap.trace(model, "Mary", **how),
    "atlas": lambda model, place, **how: ap.atlas(model, place / "text.txt", tokens=64, **how),
    "index": lambda model, place, **how: ap.index(
        model, place / "text.txt", tokens=64, out=place / f"index-{len(list(place.iterdir()))}", **how
    ),
    "evaluate": lambda model, place, **how: ap.evaluate(model, data=place / "text.txt", seq_len=16, **how),
}
every_function = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def numbers(found):
    """What was found, without names and times."""
    if hasattr(found, "total"):
        return found.total()
    return getattr(found, "loss", None) or [m.model_dump(exclude={"name", "seconds"}) for m in found.models]


@every_function
def test_every_function_takes_what_load_gives(call, place, loaded):
    model, tokenizer = loaded
    together = numbers(call(loaded, place))
    assert together == numbers(call((model, tokenizer), place)) == numbers(call(model, place, tokenizer=tokenizer))


@every_function
def test_every_function_refuses_the_same_in_the_same_words(call, place, loaded):
    model, tokenizer = loaded
    for wrong, how, part in (
        (model, {}, "needs its tokenizer"),
        (loaded, {"tokenizer": tokenizer}, "tokenizer: is given twice"),
        ((model, tokenizer, 1), {}, "a tuple is (model, tokenizer)"),
        (place / "base", {"tokenizer": tokenizer}, "tokenizer: goes with a model in memory"),
        (place / "base", {"base": place / "other"}, "--base: "),
        (loaded, {"base": place / "base"}, "base: "),
        (model, {"tokenizer": 5}, "tokenizer: int is not a tokenizer"),
        (5, {}, "model: "),
        (torch.nn.Linear(2, 2), {"tokenizer": tokenizer}, "model: "),
        (None, {}, "model: "),
    ):
        refused(lambda wrong=wrong, how=how: call(wrong, place, **how), part)


def test_the_base_that_is_named_stands_beside_a_merged_model(place):
    notes = []
    sparse, dense = models_of(place / "merged", None, place / "merged-base", "cpu", True, notes)
    assert sparse.sidecar is not None
    assert not sparse.is_base
    assert dense.is_base
    assert notes == []
    pair = models_of(place / "merged", None, str(place / "other"), "cpu", True, notes)
    next(pair)
    refused(lambda: next(pair), "other: is not the base of ", "not the weights")


@pytest.mark.parametrize("kind", ["list", "Dataset"])
def test_texts_in_memory_are_what_a_file_gives(place, loaded, tmp_path, kind):
    texts = [(place / "text.txt").read_text()]
    data = texts if kind == "list" else Dataset.from_dict({"body": texts})
    how = {} if kind == "list" else {"text_field": "body"}
    before = listing(place)
    mine, theirs = (ap.atlas(loaded, source, tokens=200, **options)
                    for source, options in ((data, how), (place / "text.txt", {})))  # fmt: skip
    assert numbers(mine) == numbers(theirs)
    assert mine.data == "texts-in-memory.jsonl"
    made = ap.index(loaded, data, out=tmp_path / "index", tokens=200, **how)
    assert made.total() == ap.index(loaded, place / "text.txt", out=tmp_path / "index", tokens=200).total()
    assert listing(place) == before


def damaged(place, folder, file, **values):
    """A copy of the base in which a file says something else."""
    shutil.copytree(place / "base", folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    return str(folder)


def test_a_panic_of_rust_code_is_one_line(place, tmp_path):
    """It shows itself only when a text is read."""
    start = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [start], "pair": [], "special_tokens": {}}
    base = damaged(place, tmp_path / "base", "tokenizer.json", post_processor=template)
    refused(lambda: bases.load_base(base), f"{base}: cannot load its tokenizer: no entry found for key")


def test_ctrl_c_is_no_fault_of_a_model(place, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bases.AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bases.load_base(str(place / "base"))


def test_a_model_that_reads_no_token_is_refused(place, tmp_path):
    base = damaged(place, tmp_path / "base", "config.json", max_position_embeddings=0)
    refused(lambda: bases.load_base(base), f"{base}: its configuration says that it reads 0 tokens")
