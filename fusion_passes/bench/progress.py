"""Progress of a long run on stderr: what is being measured, then one line for each row. With rich where it is there."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from contextlib import AbstractContextManager
from typing import Any


class Progress:
    """Counts the rows of a run. stdout stays free for tables."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.start = time.monotonic()
        self.console: Any = None
        if importlib.util.find_spec("rich") is not None:
            from rich.console import Console

            self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def measuring(self, name: str) -> AbstractContextManager[Any]:
        """A context in which a terminal shows what is under way."""
        if self.console is None or not self.console.is_terminal:
            return contextlib.nullcontext()
        return self.console.status(f"{self.done + 1}/{self.total} {name}", spinner="dots")

    def finished(self, text: str) -> None:
        """Print the line of a row that is done, with the seconds that the run has taken."""
        self.done += 1
        self.say(f"[{self.done}/{self.total}, {time.monotonic() - self.start:.0f} s] {text}")

    def say(self, text: str) -> None:
        """Print a line."""
        if self.console is not None:
            self.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)
