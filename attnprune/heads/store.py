"""Asking an index of edges: which heads link two tokens, what a head reads, the strongest edges with text around.

DuckDB reads the Parquet pieces where they are. Every answer is a list of rows, each a dict by column, so that
`pandas.DataFrame(index.heads(key=" Mary"))` is a table. No torch.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from attnprune.errors import InputError, checked, first_line, printable, shown, whole
from attnprune.heads import pieces
from attnprune.heads.result import windows
from attnprune.late import Shown

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

By = Literal["count", "weight"]
Tokens = str | int | Sequence[str | int]
"""Tokens by text, to the letter and with its spaces, or by id; several count as one."""

Row = dict[str, Any]
FILTERS = ("head", "key", "query", "kind")
_ALONE = {
    "autoinstall_known_extensions": False, "autoload_known_extensions": False, "python_enable_replacements": False,
}  # fmt: skip


def duckdb() -> ModuleType:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import duckdb
    except ImportError:
        raise InputError("DuckDB is not installed", hint='pip install "attnprune[index]"') from None
    return duckdb


@checked()
def open_index(path: str | Path) -> Index:
    """Open the folder of an index, also one that is not finished.

    Raises:
        InputError: no index, one without an edge so far, a damaged one; DuckDB is not installed.
    """
    return Index(Path(path))


class Index(Shown):
    """An opened index of edges, which questions only read.

    Every question takes the same filters, of which all hold: `head` (layer, head), `key` and `query` tokens (text or
    id, or several), `kind` of edge ("self", "first", "previous", "same", "induction", "delimiter").

    Attributes:
        path: the folder.
        record: what it was made of.
        blocks: how many blocks it holds so far; `record.blocks` if it is finished.
    """

    def __init__(self, path: Path):
        package, self.path, self.record = duckdb(), path, pieces.read_record(path)
        found = pieces.pieces_of(path)
        if not found:
            raise InputError(f"{path}: holds no edges so far", hint="the command that began it goes on with it")
        self.blocks = pieces.end_of(found[-1])
        self._error = package.Error
        self._connection: DuckDBPyConnection = package.connect(config=_ALONE)
        views = {"edges": found, "blocks": [path / pieces.BLOCKS], "vocabulary": [path / pieces.VOCABULARY]}
        readable: list[str] = []
        try:
            for name, files in views.items():
                names = [str(file.absolute()) for file in files]  # wherever we go later
                patterns = list(map(glob.escape, names))
                self._connection.read_parquet(patterns).create_view(name)
                readable += {*names, *patterns}
            self._allow_only(readable)
        except package.Error as error:
            raise InputError(f"{path}: is damaged: {first_line(error)}") from None

    def _allow_only(self, files: list[str]) -> None:
        """Shut every other file and the network out, for good. `sql` sees to it that these are only read."""
        listed = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
        for setting in (f"allowed_paths = [{listed}]", "enable_external_access = false", "lock_configuration = true"):
            self._connection.execute(f"SET {setting}")

    def __repr__(self) -> str:
        blocks = f"{self.blocks} of {self.record.blocks} blocks of {self.record.seq_len} tokens"
        return f"Index({str(self.path)!r}: {blocks})"

    @property
    def notes(self) -> list[str]:
        """What to know of the text: characters that the tokenizer does not know."""
        return self.record.notes

    @checked()
    def sql(self, query: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """The answer of DuckDB to one SELECT: tables `edges`, `blocks` (block, tokens) and `vocabulary` (token, text).

        Nothing is written, and no other file is read.

        Raises:
            InputError: another statement, or several; what DuckDB says is wrong with the query, or with the files.
        """
        try:
            kinds = [statement.type.name for statement in self._connection.extract_statements(query)]
            if kinds != ["SELECT"]:
                what = " and ".join(kinds) or "no statement"
                raise InputError(f"{self.path}: an index is only read, by one SELECT (got {what})")
            found = self._connection.execute(query, parameters)
            names = [column[0] for column in found.description or ()]
            return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
        except (self._error, TypeError, ValueError) as error:  # the latter of parameters
            raise InputError(f"{self.path}: {first_line(error)}") from None

    def total(self, **filters: Any) -> Row:
        """How many edges pass the filters, and their weight: {"count", "weight"}."""
        where, values = self._where(**filters)
        return self.sql(f"SELECT count(*) AS count, coalesce(sum(weight), 0) AS weight FROM edges{where}", values)[0]

    @checked(limit=0)
    def heads(self, *, by: By = "count", limit: int | None = None, **filters: Any) -> list[Row]:
        """The heads of the edges that pass: {"layer", "head", "count", "weight"}, the most first.

        Args:
            by: order by the number of edges, or by the sum of their weights P_ij A_ij.
            limit: at most so many rows.

        Raises:
            InputError: a filter, or a value of one, that this index does not know.
        """
        return self._groups("layer, head", by, limit, filters)

    @checked(limit=0)
    def keys(self, *, by: By = "count", limit: int | None = None, **filters: Any) -> list[Row]:
        """The tokens that are read: {"token", "text", "count", "weight"}. As `heads`."""
        return self._tokens("key_token", by, limit, filters)

    @checked(limit=0)
    def queries(self, *, by: By = "count", limit: int | None = None, **filters: Any) -> list[Row]:
        """The tokens that read: {"token", "text", "count", "weight"}. As `heads`."""
        return self._tokens("query_token", by, limit, filters)

    @checked(limit=0)
    def contexts(self, *, limit: int = 10, **filters: Any) -> list[Row]:
        """The edges of the largest weight with text around: the columns of `edges`, "key_text", "query_text", "text".

        In `text` the key stands between « and », the query between ⟦ and ⟧; " … " is text left out.

        Raises:
            InputError: as `heads`.
        """
        where, values = self._where(**filters)
        order = "ORDER BY weight DESC, block, layer, head, query, key LIMIT ?"
        rows = self.sql(f"SELECT * FROM edges{where} {order}", [*values, limit])
        wanted = list({row["block"] for row in rows})
        found = self.sql("SELECT block, tokens FROM blocks WHERE list_contains(?, block)", [wanted])
        tokens = {row["block"]: row["tokens"] for row in found}
        for row in rows:
            row["kinds"] = [kind for bit, kind in enumerate(self.record.kinds) if row["kinds"] >> bit & 1]
            row["key_text"], row["query_text"] = (self._texts[row[name]] for name in ("key_token", "query_token"))
            row["text"] = self._around(tokens[row["block"]], row["query"], row["key"])
        return rows

    @checked()
    def tokens(self, block: int) -> list[str]:
        """The tokens of a block as text.

        Raises:
            InputError: no such block.
        """
        found = self.sql("SELECT tokens FROM blocks WHERE block = ?", [block])
        if not found:
            raise InputError(f"block {block}: is not within 0 and {self.record.blocks - 1}")
        return [self._texts[token] for token in found[0]["tokens"]]

    @cached_property
    def _texts(self) -> dict[int, str]:
        return {row["token"]: row["text"] for row in self.sql("SELECT token, text FROM vocabulary")}

    def _around(self, ids: list[int], query: int, key: int) -> str:
        parts = []
        for window in windows(ids, query, key, self._texts.__getitem__):
            shown = list(window.tokens)
            for at, before, behind in ((key, "«", "»"), (query, "⟦", "⟧")):
                if 0 <= at - window.start < len(shown):
                    shown[at - window.start] = before + shown[at - window.start] + behind
            parts.append("".join(shown))
        return " … ".join(parts)

    def _groups(self, columns: str, by: By, limit: int | None, filters: dict[str, Any]) -> list[Row]:
        if by not in ("count", "weight"):
            raise InputError(f"by {printable(by)}: is neither count nor weight")
        where, values = self._where(**filters)
        return self.sql(
            f"SELECT {columns}, count(*) AS count, sum(weight) AS weight FROM edges{where} GROUP BY {columns} "
            f"ORDER BY {by} DESC, {columns} LIMIT ?", [*values, limit],
        )  # fmt: skip

    def _tokens(self, column: str, by: By, limit: int | None, filters: dict[str, Any]) -> list[Row]:
        return [
            {"token": row[column], "text": self._texts[row[column]], "count": row["count"], "weight": row["weight"]}
            for row in self._groups(column, by, limit, filters)
        ]

    def _where(self, **filters: Any) -> tuple[str, list[int]]:
        """The filters as SQL, and its values."""
        unknown = sorted(filters.keys() - set(FILTERS))
        if unknown:
            raise InputError(f"{unknown[0]}: is no filter; there are {', '.join(FILTERS)}")
        head, key, query, kind = map(filters.get, FILTERS)
        parts: list[str] = []
        values: list[int] = []
        if head is not None:
            parts.append("layer = ? AND head = ?")
            values += self._head(head)
        for column, tokens in (("key_token", key), ("query_token", query)):
            if tokens is not None:
                ids = self._ids(column, tokens)
                parts.append(f"{column} IN ({_marks(ids)})")
                values += ids
        if kind is not None:
            if kind not in self.record.kinds:
                raise InputError(f"kind {printable(kind)}: is none of {', '.join(self.record.kinds)}")
            parts.append("kinds & ? != 0")
            values.append(1 << self.record.kinds.index(kind))
        return (" WHERE " + " AND ".join(parts) if parts else ""), values

    def _head(self, pair: Any) -> list[int]:
        try:
            layer, head = map(whole, pair)
        except (TypeError, ValueError):
            raise InputError(f"head {shown(pair)}: is not (layer, head)", hint="for example head=(3, 1)") from None
        for what, number, count in (("layer", layer, self.record.layers), ("head", head, self.record.heads)):
            if not 0 <= number < count:
                raise InputError(f"{what} {number}: is not within 0 and {count - 1}")
        return [layer, head]

    def _same(self, token: Any) -> list[int]:
        """The tokens that a text or id names; none where it is neither."""
        if isinstance(token, str):
            return [number for number, text in self._texts.items() if text == token]
        try:
            wanted = whole(token)
        except TypeError:
            return []
        return [wanted] if wanted in self._texts else []

    def _ids(self, column: str, tokens: Any) -> list[int]:
        """The ids of tokens (see `Tokens`); several may have one text."""
        ids: list[int] = []
        wanted = list(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else [tokens]
        if not wanted:
            raise InputError(f"{column.partition('_')[0]}: names no token")
        for token in wanted:
            same = self._same(token)
            if not same:
                near = [text for text in self._texts.values() if text.strip() == str(token).strip()]
                hint = f"it has {', '.join(map(repr, near[:3]))}" if near else None
                raise InputError(f"{column.partition('_')[0]} {shown(token)}: is no token of this text", hint=hint)
            ids += same
        return ids


def _marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))
