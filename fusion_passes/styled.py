"""The report in a terminal: the same words as its text, styled and wrapped by rich where that is installed."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from fusion_passes.records import Outcome

if TYPE_CHECKING:
    from fusion_passes.reports import Report

_TITLE: dict[Outcome, str] = {"fused": "bold green", "refused": "bold yellow", "near_miss": "bold"}


def show(report: Report) -> None:
    """Print a report to stdout: styled on a terminal where rich is installed, else as `print` does."""
    if importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        console = Console()
        if console.is_terminal:
            console.print(renderable(report))
            return
    print(report)


def renderable(report: Report) -> Any:
    """What rich prints of a report; long lines keep their indentation where they are wrapped."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    from fusion_passes.reports import TITLES

    titles = {title: _TITLE[outcome] for outcome, title in TITLES.items()}
    lines: list[Any] = []
    for number, line in enumerate(str(report).splitlines()):
        words = line.lstrip()
        indent = len(line) - len(words)
        text = Text(words, style="bold" if number == 0 else titles.get(line, ""))
        if indent == 2:  # the fusion, and the line of the model
            text.stylize("bold cyan", 0, len(words.partition(" ")[0]))
            text.highlight_regex(r"\S+:\d+$", "underline")
        text.highlight_regex(r"^what would help:", "bold")
        text.highlight_regex(r"saves .* per call$|^\S+ \S+ of intermediates", "green")
        lines.append(Padding(text, (0, 0, 0, indent)))
    return Group(*lines)
