"""Where to store the edges of an index: SQLite beside Parquet read by DuckDB, the same rows and questions in one run.

    attnprune index examples/smollm2-half --base MODEL.gguf --data TEXT.txt --tokens 20480 -o INDEX
    python examples/compare_stores.py INDEX --out examples/results/edge-stores.json

The rows of the index are repeated as further blocks until there are --edges. Both sides get the same pieces, sorted by
layer and head, and answer with one thread; their answers are compared. SQLite has what helps it: a table clustered by
layer and head, and an index of the tokens that holds all that such a question needs. Each kind of question is asked
with --draws edges that are drawn as examples, twice, and the faster time counts.
"""

from __future__ import annotations

import argparse
import json
import math
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from attnprune.bench.clock import machine
from attnprune.files import temporary_folder, write_atomic
from attnprune.heads import pieces
from attnprune.heads.store import Index, open_index

HEADS = "SELECT layer, head, count(*) AS n, sum(weight) FROM edges WHERE {} GROUP BY layer, head ORDER BY n DESC, 1, 2"
TOKENS = (
    "SELECT {0}, count(*) AS n, sum(weight) FROM edges WHERE layer = ? AND head = ? GROUP BY {0} ORDER BY n DESC, 1"
)
STRONGEST = "SELECT * FROM edges WHERE {} ORDER BY weight DESC, block, layer, head, query, key LIMIT 10"
QUESTIONS = {
    "heads that link two tokens": (HEADS.format("key_token = ? AND query_token = ?"), ("key_token", "query_token")),
    "heads that read a token": (HEADS.format("key_token = ?"), ("key_token",)),
    "tokens that a head reads": (TOKENS.format("key_token"), ("layer", "head")),
    "tokens that read in a head": (TOKENS.format("query_token"), ("layer", "head")),
    "strongest edges of a head": (STRONGEST.format("layer = ? AND head = ?"), ("layer", "head")),
    "strongest edges of a kind": (STRONGEST.format("kinds & ? != 0"), ("kinds",)),
    "heads of a kind": (HEADS.format("kinds & ? != 0"), ("kinds",)),
}


def repeated(index: Index, edges: int) -> Iterator[pieces.Columns]:
    """The pieces of an index, again and again as further blocks, until there are so many edges."""
    made = copy = 0
    while made < edges:
        for file in pieces.pieces_of(index.path):
            table = pyarrow.parquet.read_table(file)
            columns = {
                name: column.to_numpy()[: edges - made]
                for name, column in zip(table.column_names, table.columns, strict=True)
            }
            columns["block"] = columns["block"] + np.int32(copy * index.blocks)
            made += len(columns["block"])
            if len(columns["block"]):
                yield columns
        copy += 1


class Sqlite:
    """The rows in a file of SQLite."""

    def __init__(self, file: Path):
        self.file = file
        self.connection = sqlite3.connect(file)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = NORMAL")
        columns = ", ".join(f"{name} {'REAL' if name == 'weight' else 'INTEGER'}" for name in pieces.COLUMNS)
        key = "PRIMARY KEY (layer, head, block, query, key)"
        self.connection.execute(f"CREATE TABLE edges ({columns}, {key}) WITHOUT ROWID")

    def add(self, rows: pieces.Columns) -> None:
        marks = ", ".join("?" * len(pieces.COLUMNS))
        with self.connection:
            columns = (rows[name].tolist() for name in pieces.COLUMNS)
            self.connection.executemany(f"INSERT INTO edges VALUES ({marks})", zip(*columns, strict=True))

    def finish(self) -> None:
        self.connection.execute("CREATE INDEX tokens ON edges (key_token, query_token, layer, head, weight)")
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.connection.execute("ANALYZE")
        self.connection.commit()

    def ask(self, query: str, values: list[int]) -> list[tuple[Any, ...]]:
        return self.connection.execute(query, values).fetchall()

    def size(self) -> int:
        return self.file.stat().st_size


class Parquet:
    """The rows as `attnprune index` stores them, and DuckDB."""

    def __init__(self, folder: Path):
        self.folder, self.end = folder, 0
        folder.mkdir()

    def add(self, rows: pieces.Columns) -> None:
        first, self.end = self.end, self.end + 1
        pieces.write_piece(self.folder, first, self.end, [rows])

    def finish(self) -> None:
        self.connection = duckdb.connect()
        self.connection.execute("SET threads = 1")
        self.connection.read_parquet([str(piece) for piece in pieces.pieces_of(self.folder)]).create_view("edges")

    def ask(self, query: str, values: list[int]) -> list[tuple[Any, ...]]:
        return self.connection.execute(query, values).fetchall()

    def size(self) -> int:
        return sum(piece.stat().st_size for piece in pieces.pieces_of(self.folder))


def built(store: Any, rows: Iterator[pieces.Columns]) -> dict[str, float]:
    """Seconds of the build, without those that read the rows, and its size."""
    seconds = 0.0
    for piece in rows:
        began = time.perf_counter()
        store.add(piece)
        seconds += time.perf_counter() - began
    began = time.perf_counter()
    store.finish()
    return {"build_seconds": seconds + time.perf_counter() - began, "bytes": store.size()}


def asked(stores: dict[str, Any], query: str, values: list[int]) -> dict[str, float]:
    """The faster of two times of each side, which have to agree."""
    times, answers = {}, {}
    for name, store in stores.items():
        taken = []
        for _ in range(2):
            began = time.perf_counter()
            answers[name] = store.ask(query, values)
            taken.append(time.perf_counter() - began)
        times[name] = min(taken)
    one, other = answers.values()
    same = len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=1e-6) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True)
    )
    if not same:
        raise SystemExit(f"the stores do not agree: {query} {values}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("--edges", type=int, default=10_000_000)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    index = open_index(options.index)
    random = np.random.default_rng(options.seed)
    with temporary_folder() as folder:
        stores: dict[str, Any] = {
            "sqlite": Sqlite(folder / "edges.sqlite"),
            "parquet and duckdb": Parquet(folder / "p"),
        }
        sides: dict[str, Any] = {name: built(store, repeated(index, options.edges)) for name, store in stores.items()}
        examples = [
            index.sql("SELECT * FROM edges LIMIT 1 OFFSET ?", [int(random.integers(index.total()["count"]))])[0]
            for _ in range(options.draws)
        ]
        for name, (query, columns) in QUESTIONS.items():
            times: dict[str, list[float]] = {side: [] for side in sides}
            for number, example in enumerate(examples):
                values = [1 << number % len(pieces.INDEXED)] if columns == ("kinds",) else [example[c] for c in columns]
                for side, taken in asked(stores, query, values).items():
                    times[side].append(1000 * taken)
            for side, taken in times.items():
                sides[side].setdefault("milliseconds", {})[name] = {
                    "median": float(np.median(taken)), "largest": max(taken),
                }  # fmt: skip
            print(name, {side: sides[side]["milliseconds"][name] for side in sides}, file=sys.stderr)
    versions = {"sqlite": sqlite3.sqlite_version, "duckdb": duckdb.__version__, "pyarrow": pyarrow.__version__}
    result = {
        "command": "python examples/compare_stores.py INDEX", "machine": machine(torch.device("cpu")).model_dump(),
        "store_versions": versions, "seed": options.seed, "edges": options.edges, "draws": options.draws,
        "index": index.record.model_dump(), "sides": sides,
    }  # fmt: skip
    write_atomic(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
