"""Text -> packed token blocks with a seeded, disjoint evaluation split.

Sources: a Hub data set (streamed), a local .txt, .jsonl or .parquet file, the bundled addition task, or text sampled
from the base model itself. Documents are joined by the tokenizer's end-of-text token and cut into blocks of `seq_len`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from attnprune.config import RunConfig
from attnprune.errors import AttnPruneError, InputError
from attnprune.runs import DEMO

IGNORED_LABEL = -100
DEFAULT_HUB_DATASET = "HuggingFaceFW/fineweb-edu:sample-10BT:train"
_PIECE_CHARACTERS = 1 << 16
_PIECES_AT_ONCE = 64
_SAMPLING_BYTES = 4 << 30
_MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class Blocks(Dataset):
    """Token blocks of equal length.

    Attributes:
        input_ids: int64 [N, T].
        labels: int64 [N, T]; -100 where the prediction does not count; equals `input_ids` for plain text.
        name: where the text came from.
    """

    input_ids: Tensor
    labels: Tensor
    name: str

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    def take(self, rows: Tensor) -> Blocks:
        """The given rows, in that order."""
        return Blocks(self.input_ids[rows], self.labels[rows], self.name)

    @property
    def seq_len(self) -> int:
        return self.input_ids.shape[1]

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokens and labels: equal fingerprints mean equal data."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        for tensor in (self.input_ids, self.labels):
            digest.update(tensor.to(torch.int32).contiguous().numpy().tobytes())
        return digest.hexdigest()


def load(config: RunConfig, model: Any, tokenizer: Any, model_key: str) -> tuple[Blocks, Blocks]:
    """(train, held-out) blocks of a resolved run.

    `model` (the base, dense) and `model_key` (its content fingerprint) matter only for the source 'self'.
    """
    text, train = config.data, config.train
    if (text.source == "task") != (config.model.name == DEMO):
        raise InputError(
            f"{text.source}: the bundled model reads its own task and nothing else", hint="leave out --data"
        )
    if text.source == "task":
        return addition_task(tokenizer)
    if text.source == "self":
        wanted = min(text.train_tokens, train.steps * train.batch_size * text.seq_len) + text.eval_tokens
        blocks = self_written(model, tokenizer, text.seq_len, wanted, train.seed, cache_folder(), model_key)
    else:
        # A local file is read whole, so that blocks come from all of it; a stream only as far as the run needs.
        streamed = source_name(text.source) == text.source
        wanted = train.steps * train.batch_size * text.seq_len if streamed else text.train_tokens
        limit = min(text.train_tokens, wanted) + text.eval_tokens
        texts = documents(text.source, text.text_field)
        blocks = pack(texts, tokenizer, text.seq_len, limit, source_name(text.source))
    return split(blocks, text.eval_tokens, train.seed)


def cache_folder() -> Path:
    """Where text that a model wrote is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "attnprune"


def source_name(source: str) -> str:
    """How results name a source: a Hub data set by its id, a local file without its folder."""
    return Path(source).name if Path(source).exists() else source


def split(blocks: Blocks, eval_tokens: int, seed: int) -> tuple[Blocks, Blocks]:
    """(train, eval): a seeded choice of whole blocks, about `eval_tokens` of them held out; no block is in both.

    Raises:
        InputError: fewer than two blocks, so nothing could be held out.
    """
    total = len(blocks)
    if total < 2:
        raise InputError(
            f"{blocks.name}: {total} block(s) of {blocks.seq_len} tokens are too few to hold some out",
            hint="give more text or a smaller --seq-len",
        )
    held_out = max(1, min(eval_tokens // blocks.seq_len, total // 5 or 1))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    # Sorted, so the order of the evaluation sums (and with it the last bit of the loss) does not depend on the seed.
    return blocks.take(order[held_out:].sort().values), blocks.take(order[:held_out].sort().values)


def pack(documents: Iterable[str], tokenizer: Any, seq_len: int, max_tokens: int, name: str) -> Blocks:
    """Tokenize documents, join them with the end-of-text token and cut blocks of `seq_len`; the tail is dropped.

    A tokenizer that starts every text with a BOS token (Gemma, Llama) gets one at the start of each block.

    Raises:
        InputError: the text is shorter than one block.
    """
    opening = tokenizer("")["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and tokenizer.bos_token_id in opening else []
    body = seq_len - len(bos)
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    rows: list[list[int]] = []
    buffer: list[int] = []
    pieces = ((piece, last) for document in documents for piece, last in _pieces(document))
    while len(rows) * seq_len < max_tokens and (batch := _next_pieces(pieces, max_tokens - len(rows) * seq_len)):
        tokens = tokenizer([piece for piece, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for (_, last), ids in zip(batch, tokens, strict=True):
            buffer += ids + eos if last else ids
        whole = len(buffer) // body
        rows += [bos + buffer[i * body : (i + 1) * body] for i in range(whole)]
        buffer = buffer[whole * body :]
    if not rows:
        raise InputError(
            f"{name}: the text is shorter than one block of {seq_len} tokens", hint="use a smaller --seq-len"
        )
    ids = torch.tensor(rows[: max(1, max_tokens // seq_len)], dtype=torch.int64)
    return Blocks(ids, ids.clone(), name)


def _pieces(document: str) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is the last) of a document cut at line ends: tokenizers slow down on megabytes at once."""
    start = 0
    while len(document) - start > _PIECE_CHARACTERS:
        end = document.rfind("\n", start, start + _PIECE_CHARACTERS) + 1
        end = end if end > start else start + _PIECE_CHARACTERS
        yield document[start:end], False
        start = end
    yield document[start:], True


def _next_pieces(pieces: Iterator[tuple[str, bool]], tokens: int) -> list[tuple[str, bool]]:
    """The next pieces, until they hold `tokens` characters: a fast tokenizer works on several in parallel."""
    batch: list[tuple[str, bool]] = []
    while tokens > 0 and len(batch) < _PIECES_AT_ONCE and (following := next(pieces, None)):
        batch.append(following)
        tokens -= len(following[0])
    return batch


def documents(source: str, text_field: str = "text") -> Iterable[str]:
    """The documents of a source: a local file by its suffix, otherwise a Hub data set `name[:config[:split]]`.

    Raises:
        InputError: the file is missing, empty, binary, or has no such field.
        AttnPruneError: the Hub data set cannot be reached.
    """
    path = Path(source)
    readers = {".txt": _read_txt, ".md": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix)
    if reader is None and (_exists(path) or source.startswith((".", "/", "~"))):
        raise InputError(f"{source}: not a .txt, .jsonl or .parquet file")
    if reader is None:
        return _read_hub(source, text_field)
    if not _exists(path):
        raise InputError(f"{source}: no such file")
    return _read_file(path, reader, text_field)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no permission, name too long, a NUL in the name
        return False


def _read_file(path: Path, reader: Callable[[Path, str], Iterable[str]], field: str) -> Iterator[str]:
    """The reader's documents, with every way a file can fail as one line."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: not a file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        yield from reader(path, field)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or str(error).splitlines()[0]}") from None


def _read_txt(path: Path, _: str) -> list[str]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: not UTF-8 text") from None
    if "\0" in text:
        raise InputError(f"{path}: line {text.count(chr(10), 0, text.index(chr(0))) + 1}: binary data (NUL byte)")
    if not text.strip():
        raise InputError(f"{path}: only blank lines")
    return [text]


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    found = False
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > _MAX_LINE_BYTES:
                raise InputError(f"{path}: line {number}: longer than {_MAX_LINE_BYTES >> 20} MiB")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{path}: line {number}: not valid JSON") from None
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise InputError(f"{path}: line {number}: no text field {field!r}", hint="use --text-field")
            if not row[field].isascii() and any("\ud800" <= c <= "\udfff" for c in row[field]):
                raise InputError(f"{path}: line {number}: a lone surrogate is not text")
            found = found or bool(row[field].strip())
            yield row[field]
    if not found:
        raise InputError(f"{path}: no text in field {field!r}")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise InputError(f"{path}: no column {field!r}", hint="use --text-field")
        for batch in file.iter_batches(columns=[field]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise InputError(f"{path}: column {field!r} is not text")
                yield text or ""
    except (pyarrow.ArrowException, OSError, ValueError):
        raise InputError(f"{path}: not a parquet file, or a damaged one") from None


def _read_hub(source: str, field: str) -> Iterator[str]:
    import datasets

    name, _, rest = source.partition(":")
    subset, _, part = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split=part or "train", streaming=True)
        for row in rows:
            if not isinstance(row.get(field), str):
                raise InputError(
                    f"{source}: no text field {field!r}", hint=f"fields: {', '.join(row)}; use --text-field"
                )
            yield row[field]
    except InputError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types when the Hub is out of reach
        raise AttnPruneError(
            f"{source}: cannot read this data set from the Hub: {type(error).__name__}",
            hint="give a local file with --data FILE.txt, or --data self to train on the model's own text",
        ) from error


def self_written(model: Any, tokenizer: Any, seq_len: int, tokens: int, seed: int, cache: Path, key: str) -> Blocks:
    """Blocks sampled from the base model itself (temperature 1, from its start token), cached under `cache`.

    On this text the expected loss difference to the base IS the KL divergence, and no data set is needed.
    `key` identifies the model; the cache file name also holds the sizes, the seed and the kind of device.
    """
    drawn = f"{key} {seq_len} {tokens} {seed} {model.device.type}"
    name = f"self-{hashlib.sha256(drawn.encode()).hexdigest()[:16]}.safetensors"
    file = cache / name
    if file.exists():
        try:
            ids = load_file(file)["input_ids"]
            return Blocks(ids, ids.clone(), "self")
        except SafetensorError:
            file.unlink()  # cut short: write it again
    ids = sample(model, tokenizer, -(-tokens // seq_len), seq_len, seed)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".tmp-{os.getpid()}")
    save_file({"input_ids": ids}, temporary)
    temporary.replace(file)
    return Blocks(ids, ids.clone(), "self")


def sample(model: Any, tokenizer: Any, rows: int, seq_len: int, seed: int, rows_at_once: int = 0) -> Tensor:
    """[rows, seq_len] tokens drawn from the model, each row from its start token on, at temperature 1.

    What is drawn depends on `rows_at_once` and on the device; 0 means 8 on a CPU, on CUDA as many as fit into 4 GiB.
    The global random state is left alone.

    Raises:
        InputError: the tokenizer has no token to start with.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError("self: this tokenizer has no BOS or EOS token to start a text with")
    from transformers import GenerationConfig

    own = model.generation_config
    # The checkpoint's own settings (repetition penalty, top-k, ...) would make it another distribution. Without an EOS
    # a finished row starts the next document by itself, as in packed text.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=seq_len - 1, pad_token_id=start
    )
    at_once = rows_at_once or rows_that_fit(model, seq_len)
    pieces = []
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            for first in range(0, rows, at_once):
                prompt = torch.full((min(at_once, rows - first), 1), start, device=model.device)
                pieces.append(model.generate(prompt, attention_mask=torch.ones_like(prompt)).cpu())
    finally:
        model.generation_config = own
    return torch.cat(pieces)


def rows_that_fit(model: Any, seq_len: int) -> int:
    """Rows to sample at once: 8 on a CPU; on CUDA as many as keep their cache and their logits in about 4 GiB."""
    if model.device.type != "cuda":
        return 8
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    logits = 4 * config.vocab_size * torch.float32.itemsize  # logits, softmax and what the draw makes of them
    return max(8, _SAMPLING_BYTES // (seq_len * cached + logits))


def addition_task(tokenizer: Any) -> tuple[Blocks, Blocks]:
    """The bundled task: all sums `#ab+cd=efg`, 4,096 of the 10,000 held out for evaluation (a fixed choice).

    Only the three answer digits count: their labels are kept, all others are -100. T = 10.
    """
    rows = [f"#{a:02d}+{b:02d}={a + b:03d}" for a in range(100) for b in range(100)]
    ids = torch.tensor(tokenizer(rows, add_special_tokens=False)["input_ids"])
    labels = ids.clone()
    labels[:, :-3] = IGNORED_LABEL
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(20251205))
    everything = Blocks(ids, labels, "two-digit addition")
    return everything.take(order[4096:]), everything.take(order[:4096])
