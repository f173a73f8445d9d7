"""What belongs to a base's tokenizer is in the merged folder: chat templates, added tokens, vocabularies."""

from __future__ import annotations

import os
import shutil
import stat

import pytest
from transformers import AutoTokenizer

from attnprune.errors import AttnPruneError
from attnprune.sidecar import bases
from attnprune.sidecar.format import VOCABULARY_FILES
from attnprune.sidecar.loading import load
from attnprune.sidecar.merged import load_merged, write_merged
from attnprune.sidecar.tokenizer import save_tokenizer
from attnprune.sidecar.verify import climb
from tests.helpers.factory import byte_tokenizer, refused
from tests.helpers.sidecars import TEMPLATES, base_with_a_rich_tokenizer, save_sidecar


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a sidecar of it and the merged form; the last as a user with umask 022 writes it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    base = base_with_a_rich_tokenizer(folder / "base")
    sidecar = save_sidecar(folder / "sidecar", base)
    model, tokenizer = load(sidecar.path, str(base))
    before = os.umask(0o022)
    write_merged(model, tokenizer, sidecar, folder / "merged", same_dtype=True)
    os.umask(before)
    return folder


def test_the_merged_tokenizer_is_that_of_the_base(place):
    ours, theirs = load_merged(place / "merged")[1], AutoTokenizer.from_pretrained(place / "base")
    assert ours.chat_template == theirs.chat_template == TEMPLATES
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.pad_token == "<pad>"
    assert ours("a <note><tool>b")["input_ids"] == theirs("a <note><tool>b")["input_ids"]
    shown = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(shown, tokenize=False) == "hi!"
    assert ours.apply_chat_template(shown, chat_template="tool_use", tools=[], tokenize=False).startswith("tools:")
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        assert (place / "merged" / name).read_bytes() == (place / "base" / name).read_bytes()


def test_verify_accepts_the_folder(place):
    levels = list(climb(place / "merged"))
    assert [level.error for level in levels] == [None] * 5


def test_anybody_may_read_what_was_merged(place, as_nobody):
    for path in (place / "merged", *(place / "merged").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
    folder, switch = as_nobody
    shutil.copytree(place / "merged", folder / "merged")
    switch()
    assert AutoTokenizer.from_pretrained(folder / "merged").chat_template == TEMPLATES


def test_a_template_that_is_no_file_name_is_refused_and_leaves_nothing(place, tmp_path):
    sidecar_model, tokenizer = load(place / "sidecar", str(place / "base"))
    for name in ("../../outside", "a/b"):
        tokenizer.chat_template = {"default": "D", name: "T"}
        sidecar = save_sidecar(tmp_path / "sidecar", place / "base")
        refused(lambda s=sidecar: write_merged(sidecar_model, tokenizer, s, tmp_path / "out", same_dtype=True), name)
        shutil.rmtree(tmp_path / "sidecar")
    assert not list(tmp_path.iterdir())
    tokenizer.chat_template = {"default": "D", "x" * 300: "T"}
    sidecar = save_sidecar(tmp_path / "sidecar", place / "base")
    with pytest.raises(AttnPruneError, match="cannot write"):
        write_merged(sidecar_model, tokenizer, sidecar, tmp_path / "out", same_dtype=True)
    assert [path.name for path in tmp_path.iterdir()] == ["sidecar"]


def test_vocabularies_that_lie_about_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in VOCABULARY_FILES:
        (tmp_path / name).write_text("of another model")
    made = byte_tokenizer()  # in memory: from no folder
    save_tokenizer(made, tmp_path / "made")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: byte_tokenizer())
    read = bases._read_tokenizer("models/model.gguf", "gguf", str(tmp_path), {"gguf_file": "model.gguf"})
    save_tokenizer(read, tmp_path / "read")
    for folder in ("made", "read"):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
