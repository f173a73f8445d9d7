"""The folder of an index of edges: settings, text and Parquet pieces, each of them whole or not there. No torch.

`index.json` says what was indexed, `blocks.parquet` has the tokens of each block, `vocabulary.parquet` their texts.
`edges-FIRST-END.parquet` holds the open edges of the blocks FIRST to END - 1, sorted by layer and head so that a reader
of one head skips the others. A piece ends with the block that brings it to PIECE edges, whatever was interrupted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from pydantic import Field, ValidationError

from attnprune.circuit.record import Strict
from attnprune.errors import InputError
from attnprune.files import unusable, write_atomic, write_new_folder
from attnprune.heads.result import KINDS

SCHEMA = "attnprune-index-1"
RECORD, BLOCKS, VOCABULARY = "index.json", "blocks.parquet", "vocabulary.parquet"
PIECE = 1_000_000  # edges
INDEXED = tuple(kind for kind in KINDS if kind != "offset")  # as bits of the column `kinds`, from the least
COLUMNS = {
    "block": np.int32, "query": np.int32, "key": np.int32, "layer": np.int16, "head": np.int16, "weight": np.float32,
    "query_token": np.int32, "key_token": np.int32, "kinds": np.uint8,
}  # fmt: skip
_ROWS = 65_536  # of a row group: what a reader skips or reads
_PIECE_NAME = re.compile(r"edges-(\d{8})-(\d{8})\.parquet")


class Record(Strict):
    """index.json: what an index was made of."""

    schema_id: Literal["attnprune-index-1"] = SCHEMA
    command: str
    model: str = Field(description="its name")
    model_sha256: str = Field(description="of samples of its tensors, gates among them, and its configuration")
    data: str
    data_sha256: str = Field(description="of the tokens of all blocks")
    blocks: int
    seq_len: int
    layers: int
    heads: int = Field(description="per layer")
    kinds: list[str] = Field(default=list(INDEXED), description="of the column `kinds`, from the least bit")
    notes: list[str] = Field(default=[], description="what to know of the text")


Columns = dict[str, np.ndarray]
"""Edges, a column of each name in COLUMNS."""


def begin(folder: Path, record: Record, ids: np.ndarray, vocabulary: dict[int, str]) -> None:
    """Write a new folder without edges; `ids` int [N, T] are the blocks, `vocabulary` has the texts of their tokens.

    Raises:
        InputError: as `attnprune.files.check_new_folder`.
    """
    blocks = {"block": np.arange(len(ids), dtype=np.int32), "tokens": pa.array(list(ids.astype(np.int32)))}
    # Half a character is no text that Arrow can hold, and decoding never gives one.
    words = {"token": np.array(list(vocabulary), np.int32), "text": pa.array(vocabulary.values(), pa.string())}
    write_new_folder(
        folder,
        {BLOCKS: _parquet(blocks), VOCABULARY: _parquet(words), RECORD: record.model_dump_json(indent=1) + "\n"},
    )


def discard(folder: Path, *, keep_folder: bool) -> None:
    """Remove what `begin` wrote; the folder itself too, unless it is to stay as the empty one that it was."""
    for name in (RECORD, BLOCKS, VOCABULARY):
        (folder / name).unlink(missing_ok=True)
    if not keep_folder:
        folder.rmdir()


def read_record(folder: Path) -> Record:
    """What an index was made of.

    Raises:
        InputError: there is no index, or one that this version does not read.
    """
    try:
        return Record.model_validate_json((folder / RECORD).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder}: is no index of edges", hint="attnprune index makes one") from None
    except OSError as error:
        raise unusable(folder / RECORD, error) from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"{folder / RECORD}: {where or 'the file'} is not that of an {SCHEMA}") from None


def pieces_of(folder: Path) -> list[Path]:
    """The pieces, by the blocks that they hold.

    Raises:
        InputError: one is missing between others.
    """
    found = sorted(path for path in folder.iterdir() if _PIECE_NAME.fullmatch(path.name))
    ends = [0, *map(end_of, found)]
    for path, expected in zip(found, ends, strict=False):
        if _range(path)[0] != expected:
            raise InputError(f"{folder}: the piece of block {expected} is missing before {path.name}")
    return found


def end_of(piece: Path) -> int:
    """The block behind its last one."""
    return _range(piece)[1]


def _range(piece: Path) -> tuple[int, int]:
    found = _PIECE_NAME.fullmatch(piece.name)
    assert found is not None
    return int(found[1]), int(found[2])


def write_piece(folder: Path, first: int, end: int, parts: list[Columns]) -> None:
    """Write the edges of the blocks `first` to `end` - 1."""
    edges = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    order = np.lexsort([edges[name] for name in ("key", "query", "block", "head", "layer")])
    table = {name: column[order] for name, column in edges.items()}
    write_atomic(folder / f"edges-{first:08d}-{end:08d}.parquet", _parquet(table))


def _parquet(columns: dict[str, np.ndarray] | dict[str, pa.Array]) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink, compression="zstd", row_group_size=_ROWS)
    return sink.getvalue().to_pybytes()
