"""Indexes of models whose heads are known, against loops over the text; builds that stop and go on; what is refused."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch

from attnprune import close_heads, index, open_gates, open_index
from attnprune.attention.interface import gates_of
from attnprune.errors import AttnPruneError
from attnprune.heads import pieces
from attnprune.heads.counting import COUNTED
from attnprune.sidecar.edges import open_edges
from attnprune.sidecar.loading import load
from tests.helpers.command import listing
from tests.helpers.factory import refused, save_text, save_tiny_llama
from tests.helpers.heads import LENGTH, WORDS, animal_text, plant_heads
from tests.helpers.sidecars import save_sidecar

BLOCKS = 6


@pytest.fixture
def animals(tmp_path):
    file = tmp_path / "animals.txt"
    file.write_text(animal_text(BLOCKS * LENGTH), "utf-8")
    return file


def build(planted, animals, out, **options):
    return index(planted.model, animals, out=out, tokenizer=planted.tokenizer, seq_len=LENGTH, **options)


@pytest.fixture
def planted():
    return plant_heads(gated=True)


@pytest.fixture
def made(planted, animals, tmp_path):
    return build(planted, animals, tmp_path / "index")


def of(planted, kind):
    return next(place for place, found in planted.labels.items() if found == kind)


def blocks_of(animals):
    words = animals.read_text().split()
    return [words[start : start + LENGTH] for start in range(0, len(words), LENGTH)]


def test_a_previous_token_head_links_the_pairs_of_the_text(planted, made, animals):
    """Its edges are the neighbours in the text and nothing else, so all counts are known from the text alone."""
    head, blocks = of(planted, "previous"), blocks_of(animals)
    pairs = Counter(pair for block in blocks for pair in pairwise(block))
    for (key, query), count in pairs.items():
        assert made.total(head=head, key=key, query=query)["count"] == count
        found = made.heads(key=key, query=query, kind="previous")
        assert {(row["layer"], row["head"]): row["count"] for row in found}[head] == count
    read = Counter(key for block in blocks for key in block[:-1])
    assert {row["text"]: row["count"] for row in made.keys(head=head)} == read
    assert [row["count"] for row in made.keys(head=head)] == sorted(read.values(), reverse=True)
    assert {row["text"]: row["count"] for row in made.queries(head=head)} == Counter(
        query for block in blocks for query in block[1:]
    )


@pytest.mark.parametrize("kind", COUNTED)
def test_planted_kinds_are_found(planted, made, kind):
    heads = [place for place, found in planted.labels.items() if found == kind]
    for head in heads:
        assert made.total(head=head, kind=kind) == made.total(head=head)
        assert made.total(head=head)["count"] > 0
    ranked = [(row["layer"], row["head"]) for row in made.heads(kind=kind, by="weight")]
    assert set(ranked[: len(heads)]) == set(heads)
    for row in made.contexts(kind=kind, limit=50):
        assert kind in row["kinds"]
    assert not planted.closed & {(row["layer"], row["head"]) for row in made.heads()}


def test_contexts_are_the_strongest_with_the_text_around(planted, made, animals):
    head, blocks = of(planted, "induction"), blocks_of(animals)
    rows = made.contexts(head=head, limit=1000)
    assert [row["weight"] for row in rows] == sorted((row["weight"] for row in rows), reverse=True)
    for row in rows:
        block, key, query = blocks[row["block"]], row["key"], row["query"]
        assert (row["key_text"], row["query_text"]) == (block[key], block[query])
        assert block[key - 1] == block[query]
        assert f"«{block[key]}»" in row["text"]
        assert f"⟦{block[query]}⟧" in row["text"]
        assert made.tokens(row["block"]) == block


def test_rows_are_the_open_edges_of_inspect(tmp_path):
    base, text = save_tiny_llama(tmp_path / "base"), tmp_path / "text.txt"
    sidecar = save_sidecar(tmp_path / "sidecar", base).path
    text.write_text("The gate opens when the score of"[:32])
    made = index(sidecar, text, out=tmp_path / "index", base=str(base), tokens=32)
    found = open_edges(*load(sidecar, str(base)), text.read_text())
    expected = sorted((e.layer, e.head, e.query, e.key, e.weight) for e in found.edges)
    rows = made.sql("SELECT * FROM edges ORDER BY layer, head, query, key")
    assert [(row["layer"], row["head"], row["query"], row["key"]) for row in rows] == [e[:4] for e in expected]
    assert [row["weight"] for row in rows] == pytest.approx([e[4] for e in expected], abs=1e-6)
    for row in rows:
        assert row["key_token"] == found.input_ids[row["key"]]
        assert row["query_token"] == found.input_ids[row["query"]]
    assert made.sql("SELECT tokens FROM blocks") == [{"tokens": found.input_ids}]
    assert pieces.INDEXED == COUNTED


def test_filters_hold_together(made):
    rows = made.sql("SELECT * FROM edges")
    key, query = [WORDS.index(word) for word in ("ant", "bee")], WORDS.index("cat")
    passing = [row for row in rows if row["key_token"] in key and row["query_token"] == query]
    assert made.total(key=["ant", "bee"], query=query) == {
        "count": len(passing), "weight": pytest.approx(sum(row["weight"] for row in passing)),
    }  # fmt: skip
    expected = Counter((row["layer"], row["head"]) for row in passing)
    found = made.heads(key=["ant", "bee"], query="cat")
    assert {(row["layer"], row["head"]): row["count"] for row in found} == expected
    assert made.heads(key=["ant", "bee"], query="cat", limit=2) == found[:2]
    weights = [row["weight"] for row in made.heads(by="weight")]
    assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_an_interrupted_build_goes_on_to_the_same_files(planted, animals, tmp_path, monkeypatch, stop):
    one = build(planted, animals, tmp_path / "one", tokens=LENGTH).total()["count"]
    monkeypatch.setattr(pieces, "PIECE", one * 3 // 2)  # more than a block has, less than two
    whole = build(planted, animals, tmp_path / "whole", command="one")

    def watch(_, done, of):
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(planted, animals, tmp_path / "index", watch=watch, command="one")
    halfway = listing(tmp_path / "index")
    if stop == 5:
        assert 0 < open_index(tmp_path / "index").blocks < BLOCKS
    told = []
    build(planted, animals, tmp_path / "index", watch=lambda *seen: told.append(seen), command="two")
    after = listing(tmp_path / "index")
    assert after == listing(whole.path)
    assert len([name for name in after if name.startswith("edges-")]) > 1
    assert halfway.items() <= after.items()
    assert told[0] == ("blocks", 0 if stop < 2 else stop - stop % 2, BLOCKS)
    build(planted, animals, tmp_path / "index", watch=lambda *seen: pytest.fail("it is finished"))


@pytest.mark.parametrize("was_there", [False, True])
def test_a_build_that_fails_leaves_nothing_that_holds_no_edges(animals, tmp_path, was_there):
    out, broken = tmp_path / "index", plant_heads(gated=True)
    with torch.no_grad():
        broken.model.transformer.wpe.weight.fill_(torch.nan)
    if was_there:
        out.mkdir()
    with pytest.raises(AttnPruneError):
        build(broken, animals, out)
    assert out.exists() == was_there
    assert not was_there or listing(out) == {}


def test_a_build_that_fails_later_keeps_its_edges(planted, animals, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 1)

    def watch(_, done, of):
        if done == 2:
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        build(planted, animals, tmp_path / "index", watch=watch)
    before = listing(tmp_path / "index")
    assert open_index(tmp_path / "index").blocks == 2
    refused(lambda: build(planted, animals, tmp_path / "index", tokens=LENGTH), "another number of tokens")
    assert listing(tmp_path / "index") == before


def test_another_model_text_or_length_is_refused(planted, made, animals, tmp_path):
    before = listing(made.path)
    with torch.no_grad():
        gates_of(planted.model)[1].bias[0] += 1e-3
    refused(lambda: build(planted, animals, made.path), "index: was made with another model (GPT2LMHeadModel)")
    refused(lambda: build(plant_heads(gated=False), animals, made.path), "another model")
    with torch.no_grad():
        gates_of(planted.model)[1].bias[0] -= 1e-3
    same = plant_heads(gated=True)
    other = tmp_path / "other.txt"
    other.write_text(animal_text(BLOCKS * LENGTH, seed=1))
    refused(lambda: build(same, other, made.path), "another text (animals.txt)")
    refused(lambda: build(same, animals, made.path, tokens=3 * LENGTH), "another number of tokens (")
    refused(
        lambda: index(same.model, animals, out=made.path, tokenizer=same.tokenizer, seq_len=16),
        "another block length (32)",
    )
    assert listing(made.path) == before


def test_bad_input_is_one_line(planted, made, animals, tmp_path):
    refused(lambda: build(planted, animals, tmp_path), "exists and is not empty")
    refused(lambda: build(planted, (), tmp_path / "new"), "data: a tuple names")
    refused(lambda: open_index(tmp_path), "is no index of edges")
    refused(lambda: open_index(tmp_path / "none"), "is no index of edges")
    assert "' ant'" not in str(refused(lambda: made.heads(key="yak"), "key 'yak': is no token of this text").hint)
    assert refused(lambda: made.heads(query=" ant"), "query ' ant'").hint == "it has 'ant'"
    refused(lambda: made.heads(key=99), "key 99")
    refused(lambda: made.keys(head=(2, 0)), "layer 2: is not within 0 and 1")
    refused(lambda: made.keys(head=(0, 6)), "head 6: is not within 0 and 5")
    refused(lambda: made.contexts(kind="offset"), "kind offset: is none of self, ")
    refused(lambda: made.heads(by="size"), "by size: ")
    refused(lambda: made.tokens(BLOCKS), f"block {BLOCKS}: ")
    refused(lambda: made.sql("SELECT nothing"), "index: ")
    assert not (tmp_path / "new").exists()


def test_filters_and_limits_of_another_kind_are_refused(made):
    for filters, part in (
        ({"head": "1.1"}, "head '1.1': is not (layer, head)"),
        ({"head": 1}, "head 1: is not (layer, head)"),
        ({"head": (0, 1.5)}, "head (0, 1.5): is not"),
        ({"head": (0, 1, 2)}, "head (0, 1, 2): is not"),
        ({"key": 1.5}, "key 1.5: is no token"),
        ({"key": 5.0}, "key 5.0: is no token"),
        ({"key": True}, "key True: is no token"),
        ({"query": [0, False]}, "query False: is no token"),
        ({"head": (True, 1)}, "head (True, 1): is not (layer, head)"),
        ({"key": []}, "key: names no token"),
        ({"query": [None]}, "query None: is no token"),
        ({"query": {"ant": 1}}, "query {'ant': 1}: is no token"),
        ({"kind": 5}, "kind 5: is none of self"),
        ({"kind": ["self"]}, "kind ['self']: is none of self"),
        ({"heads": (0, 1)}, "heads: is no filter; there are head, key, query, kind"),
    ):
        for question in (made.total, made.heads, made.keys, made.queries, made.contexts):
            refused(lambda question=question, filters=filters: question(**filters), part)
    for question in (made.heads, made.keys, made.queries, made.contexts):
        refused(lambda question=question: question(limit=-1), "limit -1: is less than 0")
        refused(lambda question=question: question(limit="3"), "limit: '3' is not a whole number")
        assert question(limit=0) == []
    for by in (5, None, ["count"]):
        refused(lambda by=by: made.heads(by=by), "is neither count nor weight")
    refused(lambda: made.tokens("0"), "block: '0' is not a whole number")
    refused(lambda: made.tokens(-1), "block -1: ")
    refused(lambda: made.sql(5), "query: 5 is not text")
    for parameters in (5, "ab", [object()], {"a": 1}, [1, 2]):
        refused(lambda parameters=parameters: made.sql("SELECT ?", parameters), "index: ")
    assert made.sql("SELECT ? AS a", [1]) == [{"a": 1}]


def test_an_index_says_what_it_is(made, monkeypatch):
    said = repr(made)
    assert said.startswith("Index(")
    assert f"{BLOCKS} of {BLOCKS} blocks of {LENGTH} tokens" in said
    html = made._repr_html_()
    assert html.startswith("<pre")
    assert "strongest edges" in html
    assert "open edges" in html


def test_what_is_to_know_of_the_text_stays_with_the_index(planted, made, tmp_path):
    assert made.notes == []
    text, told = tmp_path / "text.txt", []
    text.write_text("12?" * 40)
    found = index("demo", text, out=tmp_path / "new", tokens=64, seq_len=8, on_note=told.append)
    assert told == ["text.txt: 21 of 64 tokens stand for characters that the tokenizer does not know"]
    assert found.notes == open_index(found.path).notes == told
    assert "note: text.txt: 21 of 64" in found._repr_html_()


def test_an_index_is_only_read(made, tmp_path):
    """Neither the index nor any other file can be changed, and no other file read."""
    piece, other = pieces.pieces_of(made.path)[0], tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    before = listing(tmp_path)
    for statement, kind in (
        (f"COPY (SELECT 1) TO '{tmp_path}/new.csv'", "COPY"),
        (f"COPY (SELECT 1) TO '{piece}' (FORMAT parquet)", "COPY"),
        (f"EXPORT DATABASE '{tmp_path}/new'", "EXPORT"),
        (f"ATTACH '{tmp_path}/new.db'", "ATTACH"),
        ("CREATE TABLE mine AS SELECT 1", "CREATE"),
        ("CREATE OR REPLACE VIEW edges AS SELECT 1", "CREATE"),
        ("INSERT INTO edges SELECT * FROM edges", "INSERT"),
        ("DROP VIEW edges", "DROP"),
        ("SET enable_external_access = true", "SET"),
        ("INSTALL httpfs", "LOAD"),
        ("EXPLAIN ANALYZE SELECT 1", "EXPLAIN"),
        ("SELECT 1; SELECT 2", "SELECT and SELECT"),
        ("", "no statement"),
        (" -- nothing", "no statement"),
    ):
        refused(lambda query=statement: made.sql(query), f"only read, by one SELECT (got {kind})")
    for source in (f"read_csv('{other}')", f"'{other}'", f"read_text('{other}')", f"glob('{tmp_path}/*')",
                   "read_csv('https://example.com/a.csv')", "before"):  # fmt: skip
        refused(lambda source=source: made.sql(f"SELECT * FROM {source}"), "index: ")
    refused(lambda: made.sql("WITH new AS (INSERT INTO edges SELECT * FROM edges) SELECT 1"), "index: ")
    assert listing(tmp_path) == before
    assert made.sql("FROM edges") == made.sql("WITH a AS (SELECT * FROM edges) SELECT * FROM a")


def test_an_index_by_a_relative_path_stays_open(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = open_index("index")
    monkeypatch.chdir(made.path)
    assert found.total() == made.total()


def test_damage_is_one_line(made):
    (piece,) = pieces.pieces_of(made.path)
    intact = piece.read_bytes()
    piece.write_bytes(intact[:100])
    refused(lambda: open_index(made.path).heads(), "index: ")
    piece.rename(made.path / "edges-00000002-00000006.parquet")
    refused(lambda: open_index(made.path), "the piece of block 0 is missing")
    (made.path / "edges-00000002-00000006.parquet").unlink()
    refused(lambda: open_index(made.path), "holds no edges so far")
    (made.path / pieces.RECORD).write_text('{"schema_id": "attnprune-index-1"}')
    refused(lambda: open_index(made.path), "index.json: ")


def test_a_folder_with_the_marks_of_a_pattern(planted, animals, tmp_path):
    made = build(planted, animals, tmp_path / "a[b]*'?")
    assert made.total()["count"] > 0


def test_without_duckdb_it_says_what_to_install(planted, animals, made, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    for call in (lambda: build(planted, animals, tmp_path / "new"), lambda: open_index(made.path)):
        assert refused(call, "DuckDB is not installed").hint == 'pip install "attnprune[index]"'
    assert not (tmp_path / "new").exists()


def test_a_dense_model_has_every_pair(tmp_path):
    base, text = save_tiny_llama(tmp_path / "base"), save_text(tmp_path / "text.txt")
    made = index(str(base), text, out=tmp_path / "index", tokens=64, seq_len=32)
    assert made.total() == {"count": 2 * 8 * 32 * 33 // 2, "weight": pytest.approx(2 * 8 * 32)}


def test_opened_gates_and_closed_heads_are_another_model(planted, made, animals):
    """What is indexed is what the model computes now, not what its gates say."""
    for changed in (open_gates(planted.model), close_heads(planted.model, [(0, 1)])):
        with changed:
            refused(lambda: build(planted, animals, made.path), "index: was made with another model")
    build(planted, animals, made.path)
