"""Texts that a model cannot read as they are meant: a token that only the tokenizer has, a character that it does not
know, bytes that are no text. The text is refused, or its unknown characters counted; the model is not."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from attnprune.attention.interface import attach
from attnprune.circuit.tasks.build import load_task
from attnprune.data.sampling import sample
from attnprune.data.texts import load_blocks, read_blocks
from attnprune.data.vocabulary import check_tokens, ids_of, unknown_id, unknown_parts
from attnprune.runs.config import build_config
from attnprune.sidecar import bases
from attnprune.sidecar.edges import open_edges
from attnprune.sidecar.loading import load
from attnprune.sidecar.merged import load_merged, write_merged
from attnprune.sidecar.probe import measure_probe
from attnprune.training.evaluation import evaluate_model
from tests.helpers.factory import byte_tokenizer, refused, save_text, save_tiny_llama
from tests.helpers.sidecars import save_sidecar
from tests.helpers.tasks import word_tokenizer
from tests.helpers.texts import StartTokens

TOKEN = "<image_soft_token>"
MESSAGE = ("'<image_soft_token>' (id 257)", "vocabulary of 257")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base as Gemma 3 has it: 257 embeddings, and a tokenizer with one token more."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("vocabulary") / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([TOKEN])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    """(a text without the token, the same with it in the second block of 16)."""
    plain = save_text(tmp_path / "plain.txt")
    marked = tmp_path / "marked.txt"
    text = plain.read_text()
    marked.write_text(text[:20] + TOKEN + text[20:])
    return plain, marked


def test_ids_are_checked_with_their_place():
    tokenizer = word_tokenizer()
    check_tokens(torch.tensor([[0, 1], [1, 0]]), tokenizer, 2, "text")
    check_tokens(torch.tensor([], dtype=torch.int64), tokenizer, 2, "text")
    refused(lambda: check_tokens(torch.tensor([0, 2]), tokenizer, 2, "text"), "text: the token ' ' (id 2)", "of 2")
    refused(lambda: check_tokens(torch.tensor([[0, 1], [0, 2]]), tokenizer, 2, "text"), "text, block 2 of 2: the token")
    refused(lambda: check_tokens(torch.tensor([10**6]), tokenizer, 2, "text"), "the token None (id 1000000)")


def test_eval_reads_every_text_but_the_one_with_the_token(base, texts):
    plain, marked = texts
    assert evaluate_model(str(base), None, [str(plain)], seq_len=16, tokens=64)[0].tokens > 0
    refused(
        lambda: evaluate_model(str(base), None, [str(marked)], seq_len=16, tokens=64), "marked.txt, block 2", *MESSAGE
    )


def test_training_text_is_checked_before_it_is_split(base, texts):
    plain, marked = texts
    loaded = bases.load_base(str(base))
    data = {"seq_len": 16, "train_tokens": 320, "eval_tokens": 32}

    def blocks(source):
        config = build_config({"data": data | {"source": str(source)}})
        return load_blocks(config, loaded.model, loaded.tokenizer, "key")

    assert len(blocks(plain)) == 2
    refused(lambda: blocks(marked), "marked.txt, block 2 of ", *MESSAGE)


def test_inspect_and_the_merged_form_read_every_text_but_the_one_with_the_token(base, tmp_path):
    sidecar = save_sidecar(tmp_path / "sidecar", base)
    model, tokenizer = load(sidecar.path, str(base))
    write_merged(model, tokenizer, sidecar, tmp_path / "merged", same_dtype=True)
    for sparse, its_tokenizer in ((model, tokenizer), load_merged(tmp_path / "merged")):
        assert len(its_tokenizer) == 258
        assert open_edges(sparse, its_tokenizer, "plain").edges
        refused(lambda s=sparse, t=its_tokenizer: open_edges(s, t, f"a {TOKEN}"), "--text", *MESSAGE)


def test_a_start_token_that_the_model_lacks_is_refused(base):
    loaded = bases.load_base(str(base))
    assert sample(loaded.model, StartTokens(eos=0), 1, 4, 0).shape == (1, 4)
    loaded.tokenizer.bos_token = TOKEN
    refused(lambda: sample(loaded.model, loaded.tokenizer, 1, 4, 0), "self", *MESSAGE)


def test_a_probe_that_the_model_cannot_read_is_refused(base):
    model = bases.load_base(str(base)).model
    attach(model)
    assert measure_probe(model, [1, 256]).open_edges >= 0
    refused(lambda: measure_probe(model, [1, 257]), "probe: token id 257 is beyond the model's vocabulary of 257")


def test_generated_tasks_draw_only_tokens_of_the_model(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"more{number}" for number in range(500)])  # printable, and far more than the model's
    task = load_task("induction", tokenizer, vocabulary=257, count=20)
    assert max(int(batch.clean.max()) for batch in task.train + task.validation + task.test) < 257
    words = word_tokenizer()
    assert load_task("pronoun", words, vocabulary=len(words), count=4).train
    refused(lambda: load_task("pronoun", words, vocabulary=60, count=4), "pronoun: this tokenizer has", "names")
    refused(lambda: load_task("addition", tokenizer, vocabulary=20, count=4), "addition, block 1 of 4096: the token")


def test_prompts_and_answers_of_a_file_are_checked_with_their_line(base, tmp_path):
    tokenizer, file = AutoTokenizer.from_pretrained(base), tmp_path / "mine.csv"
    rows = "".join(f"{a}{a}{a},{b}{b}{b},x,y\n" for a, b in ("ab", "cd", "ef", "gh"))
    file.write_text("clean,corrupted,answer,wrong\n" + rows)
    assert load_task(str(file), tokenizer, vocabulary=257).train
    file.write_text(f"clean,corrupted,answer,wrong\n{rows}a{TOKEN},bb,x,y\n")
    refused(lambda: load_task(str(file), tokenizer, vocabulary=257), "mine.csv: line 6: clean: the token", *MESSAGE)
    file.write_text(f"clean,corrupted,answer,wrong\n{rows}aa,bb,{TOKEN},y\n")
    refused(lambda: load_task(str(file), tokenizer, vocabulary=257), f"line 6: answer '{TOKEN}' is not one token")
    file.write_text(f"clean,corrupted,correct_idx,incorrect_idx\n{rows.replace('x,y', '4,5')}aa,bb,257,5\n")
    refused(
        lambda: load_task(str(file), tokenizer, vocabulary=257), "line 6: correct_idx '257' is not a token id below 257"
    )


def test_a_block_of_one_token_is_refused(base, texts):
    refused(lambda: evaluate_model(str(base), None, [str(texts[0])], seq_len=1), "a block of 1: needs two tokens")


def digits():
    """The bundled model's tokenizer, which reads what it does not know as <pad>."""
    return bases.load_base("demo").tokenizer


def silent():
    """A tokenizer that leaves out what it does not know."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])))


def test_unknown_characters_of_one_text_are_named():
    error = refused(
        lambda: ids_of("hello#1", digits(), 14, "text"), "text: the tokenizer does not know 'h', 'e', 'l', 'o'"
    )
    assert error.hint == "it would read each as '<pad>'"
    error = refused(
        lambda: ids_of("abcdefghijkl", silent(), 2, "text"), "'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j' and 2 more"
    )
    assert error.hint == "it would leave them out"
    assert ids_of("#1<pad>2", digits(), 14, "text").tolist() == digits()(["#1<pad>2"])["input_ids"]
    assert ids_of("b a", silent(), 2, "text").tolist() == [[1, 0]]


def test_a_tokenizer_of_bytes_knows_everything():
    tokenizer = byte_tokenizer()
    tokenizer.unk_token = "<eos>"  # as GPT-2's says
    text = "é𒀀 \ufeff\x00\n<eos>e\u0301"
    assert unknown_id(tokenizer) is None
    assert unknown_parts(text, tokenizer) == []
    assert ids_of(text, tokenizer, 257, "text").shape[1] > len(text) - 4


def test_half_characters_are_no_text():
    for name in ("\udcff#1", "#1\ud800"):
        refused(lambda name=name: ids_of(name, digits(), 14, "text"), "text: is not UTF-8 text")


def test_unknown_characters_of_a_corpus_are_counted(tmp_path, base):
    text = tmp_path / "text.txt"
    text.write_text("#12+34=046 and\n" * 8)
    [source] = read_blocks(str(text), "text", digits(), 15, 10**6).sources
    assert (source.tokens, source.unknown) == (120, 8 * 5)
    notes = []
    evaluate_model("demo", None, [str(text)], seq_len=10, on_note=notes.append)
    assert notes == ["text.txt: 40 of 120 tokens stand for characters that the tokenizer does not know"]
    with pytest.warns(UserWarning, match="40 of 120 tokens"):
        evaluate_model("demo", None, [str(text)], seq_len=10)
    evaluate_model(str(base), None, [str(text)], seq_len=10, on_note=notes.append)
    assert len(notes) == 1
