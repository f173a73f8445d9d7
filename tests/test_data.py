"""Reading text, packing, splitting, fingerprints, the addition task, self-written text; every bad input."""

import contextlib
import copy
import itertools
import json
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnprune.data import blocks, sources
from attnprune.data.blocks import IGNORED_LABEL, Blocks, _pieces, pack, split
from attnprune.data.sampling import _SAMPLING_BYTES, rows_that_fit, sample, self_written
from attnprune.data.sources import documents
from attnprune.data.texts import addition_task, load_blocks
from attnprune.errors import AttnPruneError, InputError
from attnprune.runs.config import build_config
from tests.factory import refused

BOS, EOS = 256, 257
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nine", "zebras", "watch", "us"]


def byte_tokenizer(adds_bos=False, **special):
    """One token per byte, 256 <s>, 257 </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def ids_of(text):
    return byte_tokenizer()(text)["input_ids"]


def read(path, *field):
    return list(documents(str(path), *field))


def prose(characters, seed=0):
    generator = random.Random(seed)
    lines = (" ".join(generator.choices(WORDS, k=generator.randint(1, 30))) for _ in itertools.count())
    text = ""
    while len(text) < characters:
        text += next(lines) + "\n"
    return text


# Reading files that are fine


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes("Grüße\n\n日本\r\n".encode())
    assert read(file) == ["Grüße\n\n日本\r\n"]


def test_jsonl_gives_one_document_a_line_and_skips_blank_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"text": "ä\\n", "n": 1}\r\n\n   \n{"text": ""}\n{"text": "last line without newline"}'.encode())
    assert read(file) == ["ä\n", "", "last line without newline"]


def test_jsonl_of_another_field(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "x"}\n')
    assert read(file, "body") == ["x"]


def test_parquet_gives_one_document_a_row(tmp_path):
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["ä", "", "b"], "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, file)
    assert read(file) == ["ä", "", "b"]


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_parquet_of_other_string_types_and_field_names(tmp_path, kind):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": pyarrow.array(["x", "y"]).cast(kind)}), file)
    assert read(file, "body") == ["x", "y"]


# Reading files that are not


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.parquet", "missing/a.txt"])
def test_a_missing_file_is_refused(tmp_path, name):
    refused(lambda: read(tmp_path / name), "no such file")


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    refused(lambda: read(tmp_path / name), "empty")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_folder_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    refused(lambda: read(tmp_path / name))


@pytest.mark.parametrize("name", ["a.csv", "a.txt.gz", "a", "a.TXT", "folder"])
def test_an_existing_file_with_another_suffix_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    if name != "folder":
        (tmp_path / name).write_text("text")
    refused(lambda: read(tmp_path / name), "not a .txt, .jsonl or .parquet file")


@pytest.mark.parametrize("source", ["./nothing", "/nothing/here", "~/nothing", "../nothing"])
def test_a_path_is_never_taken_for_a_hub_data_set(source):
    refused(lambda: list(documents(source)))


@pytest.mark.parametrize("source", ["x" * 300, "x" * 300 + ".txt", "./" + "x" * 300])
def test_a_name_too_long_for_the_file_system_is_no_crash(source):
    with pytest.raises(AttnPruneError):
        list(documents(source))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"   \n\t\n\n", "only blank lines", id="blank"),
        pytest.param(b"one\ntwo\nthr\0ee\n", "line 3: binary data", id="nul"),
        pytest.param(b"\0" * 1000, "line 1: binary data", id="nul-first"),
        pytest.param(b"one\ntwo\xff\n", "line 2: not UTF-8", id="latin-1"),
        pytest.param("text\n".encode("utf-16"), "line 1: not UTF-8", id="utf-16"),
        pytest.param("日本".encode()[:-1], "line 1: not UTF-8", id="cut-character"),
        pytest.param(b"\x89PNG\r\n\x1a\n\0\0", "line 1: not UTF-8", id="png"),
    ],
)
def test_bad_text_is_refused_with_its_line(tmp_path, content, message):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    refused(lambda: read(file), message)


GOOD_LINE = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(GOOD_LINE + b"\n" + b'{"text": \n', "line 3: not valid JSON", id="truncated"),
        pytest.param(GOOD_LINE + b"plain text\n", "line 2: not valid JSON", id="not-json"),
        pytest.param(GOOD_LINE * 2 + b'{"text": "\xff"}\n', "line 3: not valid JSON", id="invalid-utf8"),
        pytest.param(GOOD_LINE + b"\0\0\0\0\n", "line 2: not valid JSON", id="nul"),
        pytest.param(GOOD_LINE + b"[" * 100_000 + b"\n", "line 2: not valid JSON", id="deep"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}\n", "line 1: not valid JSON", id="long-number"),
        pytest.param('{"text": "x"}\n'.encode("utf-16"), "line 1", id="utf-16"),
        pytest.param(GOOD_LINE + b'{"body": "x"}\n', "line 2: no text field 'text'", id="no-field"),
        pytest.param(b'{"text": 5}\n', "line 1: no text field", id="number"),
        pytest.param(b'{"text": null}\n', "line 1: no text field", id="null"),
        pytest.param(b'{"text": ["x"]}\n', "line 1: no text field", id="list-field"),
        pytest.param(b'["text"]\n', "line 1: no text field", id="list"),
        pytest.param(b'"text"\n', "line 1: no text field", id="string"),
        pytest.param(b'{"text": " \\n"}\n{"text": ""}\n', "no text in field", id="only-blank"),
        pytest.param(b"\n  \n", "no text in field", id="blank-lines"),
    ],
)
def test_bad_jsonl_is_refused_with_its_line(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    refused(lambda: read(file), message)


def test_a_70_megabyte_line_is_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD_LINE)
    with file.open("r+b") as out:
        out.truncate(70 << 20)  # sparse: the rest is one line of NULs
    refused(lambda: read(file), "line 2: longer than 64 MiB")


def test_a_line_up_to_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_LINE_BYTES", 100)
    file = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * 87}) + "\n"
    file.write_text(line)
    assert len(line) == 100
    assert read(file) == ["x" * 87]
    file.write_text(json.dumps({"text": "x" * 88}) + "\n")
    refused(lambda: read(file), "line 1: longer than")


def test_a_lone_surrogate_is_refused_or_replaced_but_never_a_crash(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "\\ud800 and some more text"}\n')
    with contextlib.suppress(InputError):
        assert len(pack(documents(str(file)), byte_tokenizer(), 4, 100, "a"))


def parquet_bytes():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["hello world"] * 3}), sink)
    return sink.getvalue().to_pybytes()


def overwritten(start, stop, value=0xFF):
    raw = bytearray(parquet_bytes())
    raw[start:stop] = bytes([value]) * len(raw[start:stop])
    return bytes(raw)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"hello", id="text"),
        pytest.param(b"x" * 5000, id="no-magic"),
        pytest.param(parquet_bytes()[: len(parquet_bytes()) // 2], id="truncated"),
        pytest.param(b"PAR1" + bytes(8) + b"PAR1", id="empty-footer"),
        pytest.param(overwritten(-30, -8), id="damaged-footer"),
        pytest.param(overwritten(4, 60), id="damaged-page"),
    ],
)
def test_a_damaged_parquet_file_is_refused(tmp_path, content):
    file = tmp_path / "a.parquet"
    file.write_bytes(content)
    refused(lambda: read(file), str(file))


def test_parquet_without_the_column_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), file)
    error = refused(lambda: read(file), "no column 'text'")
    assert "--text-field" in error.hint


@pytest.mark.parametrize("column", [[1, 2], [["x"]], [{"a": "x"}], [b"bytes"]], ids=["int", "list", "struct", "bytes"])
def test_a_parquet_column_that_is_not_text_is_refused(tmp_path, column):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    refused(lambda: read(file), "not text")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "closed/a.txt"])
def test_a_file_without_permission_is_refused(as_nobody, name):
    folder, switch = as_nobody
    (folder / "closed").mkdir()
    (folder / name).write_text("text")
    (folder / name).chmod(0)
    (folder / "closed").chmod(0)
    switch()
    refused(lambda: read(folder / name), str(folder / name))


# Hub data sets


def test_a_hub_data_set_out_of_reach_fails_with_a_way_out():
    with pytest.raises(AttnPruneError) as caught:
        list(documents("no-such-organisation/no-such-set"))
    assert caught.value.exit_code == 1
    assert not isinstance(caught.value, InputError)
    assert caught.value.message.startswith("no-such-organisation/no-such-set: cannot read")
    assert len(caught.value.message.splitlines()) == 1
    assert "--data" in caught.value.hint


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), FileNotFoundError("x"), ValueError("bad"), OSError()])
@pytest.mark.parametrize("rows_before", [0, 2])
def test_any_hub_failure_is_one_error(monkeypatch, error, rows_before):
    def load_dataset(*args, **kwargs):
        if not rows_before:
            raise error
        return stream()

    def stream():
        yield from [{"text": "x"}] * rows_before
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(AttnPruneError) as caught:
        list(documents("some/set"))
    assert caught.value.exit_code == 1
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("some/set", ("some/set", None, "train")),
        ("some/set:sub", ("some/set", "sub", "train")),
        ("some/set:sub:validation", ("some/set", "sub", "validation")),
        ("some/set::test", ("some/set", None, "test")),
    ],
)
def test_a_hub_source_names_set_configuration_and_split(monkeypatch, source, expected):
    seen = []

    def load_dataset(name, subset, *, split, streaming):
        seen.append((name, subset, split))
        assert streaming
        return iter([{"text": "x"}, {"text": "y"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(documents(source)) == ["x", "y"]
    assert seen == [expected]


def test_a_hub_data_set_without_the_field_is_refused_with_its_fields(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter([{"body": "x", "id": 1}]))
    error = refused(lambda: list(documents("some/set")), "no text field 'text'")
    assert "body, id" in error.hint


# Packing


def test_documents_are_joined_by_the_end_of_text_token():
    blocks = pack(["ab", "cde"], byte_tokenizer(), 3, 100, "name")
    assert blocks.input_ids.tolist() == [[*ids_of("ab"), EOS], ids_of("cde")]  # the last EOS is in the dropped tail
    assert blocks.input_ids.dtype == torch.int64
    assert torch.equal(blocks.labels, blocks.input_ids)
    assert blocks.name == "name"
    assert (len(blocks), blocks.seq_len) == (2, 3)


def test_a_block_crosses_documents_and_the_tail_is_dropped():
    blocks = pack(["abc", "d", "", "efgh"], byte_tokenizer(), 4, 100, "name")
    stream = [*ids_of("abc"), EOS, *ids_of("d"), EOS, EOS, *ids_of("efgh"), EOS]
    assert blocks.input_ids.flatten().tolist() == stream[:12]


def test_every_block_starts_with_bos_when_the_tokenizer_adds_it():
    blocks = pack(["abcdefg", "hij"], byte_tokenizer(adds_bos=True), 4, 100, "name")
    stream = [*ids_of("abcdefg"), EOS, *ids_of("hij"), EOS]
    assert blocks.input_ids[:, 0].tolist() == [BOS] * 4
    assert blocks.input_ids[:, 1:].flatten().tolist() == stream[:12]


def test_a_bos_token_the_tokenizer_does_not_add_is_not_added():
    assert BOS not in pack(["abcdefg"], byte_tokenizer(), 4, 100, "name").input_ids


def test_without_an_end_of_text_token_documents_are_adjacent():
    blocks = pack(["abc", "def"], byte_tokenizer(eos_token=None), 6, 100, "name")
    assert blocks.input_ids.tolist() == [ids_of("abcdef")]


@pytest.mark.parametrize("texts", [["abc"], ["a", "b"], [], [""]])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_text_shorter_than_one_block_is_refused(texts, adds_bos):
    error = refused(
        lambda: pack(texts, byte_tokenizer(adds_bos), 6, 100, "name"), "name", "shorter than one block of 6"
    )
    assert "--seq-len" in error.hint


def test_text_of_exactly_one_block_is_enough():
    assert len(pack(["abc"], byte_tokenizer(), 4, 100, "name")) == 1


@pytest.mark.parametrize(("max_tokens", "rows"), [(40, 10), (43, 10), (4, 1), (1, 1)])
def test_no_more_than_max_tokens_and_no_endless_reading(max_tokens, rows):
    taken = Counter()

    def endless():
        for _ in range(1000):
            taken["documents"] += 1
            yield "abcdefghij"

    blocks = pack(endless(), byte_tokenizer(), 4, max_tokens, "name")
    assert blocks.input_ids.shape == (rows, 4)
    assert taken["documents"] <= max_tokens // 11 + 2


def test_a_long_document_is_not_tokenized_far_beyond_max_tokens(monkeypatch):
    monkeypatch.setattr(blocks, "_PIECE_CHARACTERS", 100)
    tokenizer, seen = byte_tokenizer(), Counter()

    def counting(texts, **options):
        seen["characters"] += len("".join(texts))
        return tokenizer(texts, **options)

    for attribute in ("bos_token_id", "eos_token_id"):
        setattr(counting, attribute, getattr(tokenizer, attribute))
    assert len(pack([prose(20_000)], counting, 10, 500, "name")) == 50
    assert seen["characters"] < 2000


@pytest.mark.parametrize(
    "text", ["", "x", "ab\n" * 100, "y" * 500, "\n" * 300, prose(5000), "ä日" * 99 + "\n" + "z" * 64]
)
def test_pieces_join_to_the_document(monkeypatch, text):
    monkeypatch.setattr(blocks, "_PIECE_CHARACTERS", 64)
    pieces, last = zip(*_pieces(text), strict=True)
    assert "".join(pieces) == text
    assert all(len(piece) <= 64 for piece in pieces)
    assert last == (*[False] * (len(pieces) - 1), True)


def test_blocks_do_not_depend_on_how_many_pieces_are_tokenized_at_once(monkeypatch):
    tokenizer = trained_tokenizer()
    monkeypatch.setattr(blocks, "_PIECE_CHARACTERS", 64)
    texts = [prose(700, seed) for seed in range(9)] + ["", "x"]
    together = pack(texts, tokenizer, 16, 10**6, "name")
    monkeypatch.setattr(blocks, "_PIECES_AT_ONCE", 1)
    assert pack(texts, tokenizer, 16, 10**6, "name").fingerprint == together.fingerprint


def trained_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["</s>"],
    )
    tokenizer.train_from_iterator([prose(20_000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_a_long_document_gives_almost_the_tokens_of_one_call():
    tokenizer, text = trained_tokenizer(), prose(200_000, seed=1)
    whole = tokenizer(text)["input_ids"]
    pieces = [piece for piece, _ in _pieces(text)]
    assert len(pieces) > 2  # 64 Ki characters each
    in_pieces = pack([text], tokenizer, 1, 10**9, "name").input_ids.flatten().tolist()
    assert tokenizer.decode(in_pieces[:-1]) == text
    assert abs(len(in_pieces) - 1 - len(whole)) <= 2 * len(pieces)
    first = int(0.99 * len(tokenizer(pieces[0])["input_ids"]))
    assert in_pieces[:first] == whole[:first]


# Blocks and split


def numbered(rows, seq_len=4):
    ids = torch.arange(rows * seq_len).reshape(rows, seq_len)
    return Blocks(ids, ids.clone(), "numbers")


def test_blocks_are_a_data_set():
    blocks = numbered(3)
    assert len(blocks) == 3
    assert {key: value.tolist() for key, value in blocks[1].items()} == {
        "input_ids": [4, 5, 6, 7],
        "labels": [4, 5, 6, 7],
    }
    assert blocks.take(torch.tensor([2, 0])).input_ids[:, 0].tolist() == [8, 0]


def first_tokens(blocks):
    return blocks.input_ids[:, 0].tolist()


@pytest.mark.parametrize(
    ("rows", "eval_tokens", "held_out"), [(100, 40, 10), (100, 43, 10), (100, 10**6, 20), (100, 1, 1)]
)
def test_split_holds_out_about_eval_tokens_and_at_most_a_fifth(rows, eval_tokens, held_out):
    train, held = split(numbered(rows), eval_tokens, seed=0)
    assert (len(train), len(held)) == (rows - held_out, held_out)


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 9, 50])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_disjoint_and_exhaustive(rows, seed):
    blocks = numbered(rows)
    train, held = split(blocks, 12, seed)
    assert len(train) >= 1
    assert len(held) >= 1
    assert sorted(first_tokens(train) + first_tokens(held)) == first_tokens(blocks)
    assert first_tokens(train) == sorted(first_tokens(train))
    assert first_tokens(held) == sorted(first_tokens(held))
    assert torch.equal(train.labels, train.input_ids)


def test_split_depends_on_the_seed_alone():
    before = torch.get_rng_state()
    same, again, other = (split(numbered(50), 40, seed)[1].fingerprint for seed in (1, 1, 2))
    assert same == again != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_blocks_are_refused(rows):
    error = refused(lambda: split(numbered(rows), 4, seed=0), "numbers", f"{rows} block(s)")
    assert error.hint


def test_the_fingerprint_is_that_of_the_content():
    ids = torch.arange(12)
    base = Blocks(ids.reshape(3, 4), ids.reshape(3, 4), "a")
    assert base.fingerprint == Blocks(base.input_ids.clone(), base.labels.clone(), "b").fingerprint
    token, label = base.input_ids.clone(), base.labels.clone()
    token[2, 3] += 1
    label[0, 0] = IGNORED_LABEL
    others = [
        Blocks(token, base.labels, "a"),
        Blocks(base.input_ids, label, "a"),
        Blocks(ids.reshape(4, 3), ids.reshape(4, 3), "a"),
        base.take(torch.tensor([1, 0, 2])),
        base.take(torch.tensor([0, 1])),
    ]
    assert len({blocks.fingerprint for blocks in [base, *others]}) == 6


def test_the_fingerprint_of_a_view_is_that_of_its_values():
    wide = torch.arange(24).reshape(3, 8)
    view = wide[:, ::2]
    assert Blocks(view, view, "a").fingerprint == Blocks(view.contiguous(), view.contiguous(), "a").fingerprint


# The addition task


def character_tokenizer():
    vocabulary = {character: index for index, character in enumerate("0123456789+=#")} | {"<pad>": 13}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@pytest.fixture(scope="module")
def task():
    return addition_task(character_tokenizer())


def lines_of(blocks):
    return ["".join("0123456789+=#"[token] for token in row) for row in blocks.input_ids.tolist()]


def test_the_task_has_10000_rows_4096_of_them_held_out(task):
    train, held_out = task
    assert (tuple(train.input_ids.shape), tuple(held_out.input_ids.shape)) == ((5904, 10), (4096, 10))
    rows = lines_of(train) + lines_of(held_out)
    assert set(rows) == {f"#{a:02d}+{b:02d}={a + b:03d}" for a in range(100) for b in range(100)}
    assert len(rows) == 10_000


def test_every_sum_is_correct(task):
    for row in lines_of(task[0])[:500] + lines_of(task[1])[:500]:
        left, answer = row[1:].split("=")
        first, second = left.split("+")
        assert int(first) + int(second) == int(answer)


def test_only_the_answer_digits_count(task):
    for part in task:
        assert (part.labels[:, :7] == IGNORED_LABEL).all()
        assert torch.equal(part.labels[:, 7:], part.input_ids[:, 7:])
        assert blocks.name == "two-digit addition"


def test_the_held_out_sums_are_a_fixed_choice(task):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = addition_task(character_tokenizer())
    assert [blocks.fingerprint for blocks in again] == [blocks.fingerprint for blocks in task]
    assert torch.equal(torch.get_rng_state(), before)


# Self-written text


class StartTokens:
    def __init__(self, bos=0, eos=1):
        self.bos_token_id = bos
        self.eos_token_id = eos


@pytest.fixture(scope="module")
def writer():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write(writer, cache, *, seq_len=8, tokens=160, seed=0, key="key", start=None):
    return self_written(writer, start or StartTokens(), seq_len, tokens, seed, cache, key)


def test_self_written_blocks_start_with_bos(writer, tmp_path):
    blocks = write(writer, tmp_path)
    assert blocks.input_ids.shape == (20, 8)
    assert blocks.input_ids.dtype == torch.int64
    assert (blocks.input_ids[:, 0] == 0).all()
    assert torch.equal(blocks.labels, blocks.input_ids)
    assert blocks.name == "self"
    assert len({tuple(row) for row in blocks.input_ids.tolist()}) > 10  # sampled, not one answer repeated


def test_the_number_of_tokens_is_rounded_up_to_whole_blocks(writer, tmp_path):
    assert write(writer, tmp_path, tokens=73).input_ids.shape == (10, 8)


def test_every_token_can_be_written_also_bos_and_eos(writer, tmp_path):
    written = write(writer, tmp_path, seq_len=32, tokens=1024).input_ids[:, 1:].flatten()
    assert torch.bincount(written, minlength=32).min() > 0


def test_self_written_text_follows_the_models_own_distribution(writer, tmp_path):
    model = copy.deepcopy(writer)
    with torch.no_grad():
        model.lm_head.weight *= 25  # far from uniform
        written = write(model, tmp_path, seq_len=32, tokens=2048).input_ids
        log_p = model(written).logits[:, :-1].log_softmax(-1)
    surprise = -log_p.gather(-1, written[:, 1:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert entropy.mean() < 3.0  # ln 32 is 3.47
    assert (surprise - entropy).mean().abs() < 4 * (surprise - entropy).std() / surprise.numel() ** 0.5


def test_an_end_of_text_token_starts_the_text_where_there_is_no_bos(writer, tmp_path):
    assert (write(writer, tmp_path, start=StartTokens(None, 5)).input_ids[:, 0] == 5).all()


def test_a_tokenizer_without_start_token_is_refused(writer, tmp_path):
    refused(lambda: write(writer, tmp_path, start=StartTokens(None, None)), "self")
    assert not list(tmp_path.iterdir())


def test_self_written_text_is_deterministic_for_a_seed(writer, tmp_path):
    first = write(writer, tmp_path / "a")
    torch.manual_seed(99)
    assert write(writer, tmp_path / "b").fingerprint == first.fingerprint
    assert write(writer, tmp_path / "c", seed=1).fingerprint != first.fingerprint


def test_rows_can_be_written_together(writer):
    written = [sample(writer, StartTokens(), 12, 8, 0, at_once) for at_once in (0, 8, 12)]
    assert torch.equal(written[0], written[1])  # eight at a time on a CPU
    assert written[2].shape == (12, 8)
    assert not torch.equal(written[0], written[2])


def test_on_cuda_as_many_rows_are_sampled_as_fit(writer):
    assert rows_that_fit(writer, 8) == 8
    cache = writer(torch.zeros(1, 8, dtype=torch.int64), use_cache=True).past_key_values
    cached = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    on_cuda = SimpleNamespace(config=writer.config, dtype=writer.dtype, device=torch.device("cuda"))
    rows, logits = rows_that_fit(on_cuda, 8), 16 * writer.config.vocab_size
    assert rows * (cached + logits) <= _SAMPLING_BYTES < (rows + 1) * (cached + logits)
    assert rows_that_fit(on_cuda, 10**9) == 8


def test_self_written_text_leaves_the_global_generators_alone(writer, tmp_path):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())

    before = states()
    write(writer, tmp_path)
    assert states() == before


def test_self_written_text_is_read_from_the_cache(writer, tmp_path, monkeypatch):
    first = write(writer, tmp_path)
    monkeypatch.setattr(writer, "generate", lambda *args, **options: pytest.fail("generated again"))
    assert write(writer, tmp_path).fingerprint == first.fingerprint
    assert torch.equal(write(writer, tmp_path).labels, first.labels)


@pytest.mark.parametrize("change", [{"seed": 1}, {"seq_len": 16}, {"tokens": 80}, {"key": "another"}])
def test_the_cache_keeps_different_requests_apart(writer, tmp_path, change):
    write(writer, tmp_path)
    write(writer, tmp_path, **change)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_generation_leaves_no_cache_file(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "generate", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(writer, tmp_path)
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize("keep", [0, 100, 300])
def test_a_damaged_cache_file_is_never_a_crash(writer, tmp_path, keep):
    first = write(writer, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:keep])
    with contextlib.suppress(AttnPruneError):
        assert write(writer, tmp_path).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 50.0}, {"no_repeat_ngram_size": 1}, {"min_p": 0.9}, {"suppress_tokens": [3, 4, 5]}],
    ids=lambda settings: next(iter(settings)),
)
def test_the_checkpoints_own_generation_settings_do_not_bend_the_distribution(writer, tmp_path, monkeypatch, settings):
    plain = write(writer, tmp_path / "plain")
    for name, value in settings.items():
        monkeypatch.setattr(writer.generation_config, name, value)
    assert write(writer, tmp_path / "bent").fingerprint == plain.fingerprint


# load: the source decides


def test_load_reads_packs_and_splits_a_local_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(prose(2000))
    config = build_config({"data": {"source": str(file), "seq_len": 10, "train_tokens": 300, "eval_tokens": 100}})
    train, held_out = load_blocks(config, None, byte_tokenizer(), "key")
    assert (len(train), len(held_out)) == (32, 8)  # 400 tokens, at most a fifth held out


def test_load_writes_its_own_text_into_the_users_cache(writer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = {
        "data": {"source": "self", "seq_len": 8, "eval_tokens": 16},
        "train": {"steps": 2, "batch_size": 4},
    }
    train, held_out = load_blocks(build_config(settings), writer, StartTokens(), "key")
    assert (len(train), len(held_out)) == (8, 2)  # 2 steps of 4 blocks, and 16 tokens more
    assert list((tmp_path / "attnprune").glob("self-*"))


def test_load_gives_the_addition_task_to_the_bundled_model_only(task):
    settings = {"data": {"source": "task"}, "model": {"name": "demo"}}
    train, held_out = load_blocks(build_config(settings), None, character_tokenizer(), "key")
    assert (train.fingerprint, held_out.fingerprint) == (task[0].fingerprint, task[1].fingerprint)
    other = build_config({"data": {"source": "task"}, "model": {"name": "other/model"}})
    refused(lambda: load_blocks(other, None, character_tokenizer(), "key"), "task")
