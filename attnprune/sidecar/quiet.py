"""Silence for transformers' own bars and warnings."""

from __future__ import annotations

from transformers.utils import logging


class quiet:  # noqa: N801
    """Silence transformers' progress bars and warnings inside the block; errors are raised as ours."""

    def __enter__(self) -> None:
        self.level = logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        logging.set_verbosity(self.level)
        if self.bars:
            logging.enable_progress_bar()
