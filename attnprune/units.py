"""Numbers as people read them: shares, times, sizes."""

from __future__ import annotations

import re

NOT_FINITE = "not finite"


def percent(share: float | None) -> str:
    """A share with three significant digits: 41 %, 2.66 %, 0.312 %."""
    return NOT_FINITE if share is None else f"{100 * share:.3g} %"


def number(value: float | None, form: str = ".3f") -> str:
    """What was measured, in a format, or that it is no finite number."""
    return NOT_FINITE if value is None else format(value, form)


def counted(count: int, noun: str) -> str:
    """A number of things: 1 block, 2,000 blocks."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as 45 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def seconds(text: str) -> float:
    """Seconds of a duration as people write it: 90s, 10m, 1h, 1h30m.

    Raises:
        ValueError: it is none, or 0.
    """
    found = re.fullmatch(r"(?:(\d{1,4})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s)?", text)
    total = sum(int(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    if not total:
        raise ValueError(f"not a duration like 90s, 10m or 1h30m (got {text!r})")
    return float(total)


def size(count: float, unit: str = "B") -> str:
    """A byte count with a decimal prefix."""
    for prefix in ("", "k", "M"):
        if count < 1000:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} G{unit}"
