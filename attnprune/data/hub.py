"""The rows of a Hub data set, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attnprune.data.files import Row, column_of
from attnprune.errors import AttnPruneError, InputError, first_line


class Rows:
    """The rows of `name[:config[:split]]`, in order; read only as far as they are asked for.

    Attributes:
        number: rows read so far.
    """

    def __init__(self, source: str, field: str, position: dict[str, Any] | None = None):
        """From the first row on, or from a `position` in the same version of the data set."""
        self.source, self.field, self._start = source, field, position or {"number": 0}
        self.number: int = self._start["number"]
        self._stream: Any = None

    @property
    def position(self) -> dict[str, Any]:
        """Where the next row is, as JSON."""
        return {"number": self.number, "stream": self._stream.state_dict()}

    def __iter__(self) -> Iterator[Row]:
        """Read on.

        Raises:
            InputError: no such data set (or a private one), configuration, split or column.
            AttnPruneError: the Hub cannot be reached, or what it sent cannot be read.
        """
        import datasets

        source, field = self.source, self.field
        name, subset, part = _parts(source)
        if "[" in f"{subset}:{part}":
            raise InputError(
                f"{source}: a slice of a split cannot be streamed",
                hint="name the split alone; no more of it is read than the run needs",
            )
        try:
            self._stream = datasets.load_dataset(name, subset or None, split=part or "train", streaming=True)
            if "stream" in self._start:
                self._stream.load_state_dict(self._start["stream"])
            for row in self._stream:
                self.number += 1
                column = column_of(row, field)
                if column is None:
                    raise InputError(
                        f"{source}: no text field {field!r}", hint=f"fields: {', '.join(row)}; use --text-field"
                    )
                yield Row(f"{source}: row {self.number}", column, row[column])
        except InputError:
            raise
        except Exception as error:  # datasets raises a dozen unrelated types
            raise _explained(error, source, name, subset, part or "train") from error


def can_be_named(source: str) -> bool:
    """Whether the Hub's rules allow the name in `name[:config[:split]]`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(_parts(source)[0])
    except HFValidationError:
        return False
    return True


def version(source: str) -> str:
    """The commit that a data set is at.

    Raises:
        InputError: no such data set (or a private one).
        AttnPruneError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    name, subset, part = _parts(source)
    try:
        return HfApi().dataset_info(name).sha or ""
    except Exception as error:
        raise _explained(error, source, name, subset, part or "train") from error


def _parts(source: str) -> tuple[str, str, str]:
    """Name, configuration and split; "" for what is left out."""
    name, _, rest = source.partition(":")
    subset, _, part = rest.partition(":")
    return name, subset, part


def _explained(error: Exception, source: str, name: str, subset: str, part: str) -> AttnPruneError:
    from datasets.exceptions import DatasetNotFoundError

    cause = first_line(error)
    if isinstance(error, DatasetNotFoundError):
        return InputError(f"{source}: {cause}", hint="a private or gated one needs: hf auth login")
    there = _what_exists(name, subset, part) if isinstance(error, ValueError) else None
    if there is not None:
        return InputError(f"{source}: {cause}", hint=there)
    return AttnPruneError(
        f"{source}: cannot read this data set from the Hub: {type(error).__name__}: {cause}",
        hint="give a local file with --data FILE.txt; sparsify and eval take --data self too, the model's own text",
    )


def _what_exists(name: str, subset: str, part: str) -> str | None:
    """The configurations or splits of a data set that lacks the asked one; None if neither is the fault."""
    import datasets

    try:
        subsets = datasets.get_dataset_config_names(name)
        if subset not in subsets and (subset or len(subsets) != 1) and (subset or "default" not in subsets):
            return f"configurations: {_listed(subsets)}; as in {name}:{subsets[0]}"
        parts = datasets.get_dataset_split_names(name, subset or None)
    except Exception:  # then the first failure is the one to tell
        return None
    return None if part in parts else f"splits: {_listed(parts)}; as in {name}:{subset}:{parts[0]}"


def _listed(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
