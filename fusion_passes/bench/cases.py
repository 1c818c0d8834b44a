"""The benchmark cases that the ops declare, and the choice among them.

An op of this package declares a function `cases` in its module. Another package names one as an entry point of the
group `fusion_passes.cases`, under the name of its op; the function returns a list of `fusion_passes.benchmarking.Case`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import logging
import pkgutil
from collections.abc import Iterable, Sequence

from fusion_passes import ops
from fusion_passes.benchmarking import Case

log = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "fusion_passes.cases"


def declared() -> dict[str, list[Case]]:
    """The cases of every op that declares some, by the name of the op; our own first."""
    found: dict[str, list[Case]] = {}
    for module in pkgutil.iter_modules(ops.__path__):
        if not module.name.startswith("_"):
            declare = getattr(importlib.import_module(f"{ops.__name__}.{module.name}"), "cases", None)
            if declare is not None:
                found[module.name] = declare()
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        # Another package's mistake must not keep ours from being measured.
        try:
            found.setdefault(entry.name, entry.load()())
        except Exception as error:
            log.warning("entry point %s = %s of group %s is ignored: %s", entry.name, entry.value, entry.group, error)
    return found


def select(names: Sequence[str] = (), part: str = "", sizes: str = "all") -> list[tuple[str, Case]]:
    """Pairs of op and case.

    Args:
        names: the ops; all for none.
        part: part of the names of the cases, or several, separated by commas; "" for all.
        sizes: "all", or "small" for those that move little memory.

    Raises:
        ValueError: an unknown op, or no case is left; the message lists what there is.
    """
    known = declared()
    for name in names:
        require(name, known, "op")
    chosen = [(name, case) for name in (names or known) for case in known[name]]
    named = [pair for pair in chosen if any(text in pair[1].name for text in part.split(","))]
    if not named:
        shown = "; ".join(case.name for _, case in chosen)
        raise ValueError(f"no case of {', '.join(names or known)} has {part!r} in its name: there are {shown}")
    chosen = [pair for pair in named if sizes == "all" or pair[1].small]
    if not chosen:
        raise ValueError(f"every case with {part!r} in its name is large: --sizes all takes them in")
    return chosen


def require(name: str, known: Iterable[str], what: str) -> None:
    """Raise a ValueError that lists the known names unless `name` is one of them."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}")
