"""The setting `expect`: a compile fails unless each fusion was found as often as its user says. And a word on nothing.

The count is of one graph that Dynamo hands to the compiler, which is the whole model where the model is compiled with
`fullgraph=True`: its forward graph, with the subgraphs of control flow in it. It is taken where the pass runs, before
anything is cached, and the setting is part of the cache keys: a graph that comes from a cache has passed.

Where a compile fused nothing at all, one warning names the candidate that came nearest.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch._dynamo.utils import counters
from torch.fx import Graph

from fusion_passes import records
from fusion_passes.records import Record

log = logging.getLogger(__name__)

# Key of GraphModule.meta under which a subgraph keeps its records for the graph that calls it.
_META = "fusion_passes_records"


class ExpectationError(Exception):
    """Another number of sites was fused than `expect` says; the message holds the numbers and the report."""


def normalize(value: Any) -> Any:
    """A mapping from fusions to counts as the text that settings hold; anything else as it is.

    Raises:
        TypeError: a name is no string, or a count is no integer.
        ValueError: a count is negative.
    """
    if not isinstance(value, Mapping):
        return value
    for name, count in value.items():
        if not isinstance(name, str) or not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"fusion_passes.expect must map names of fusions to integers, got {name!r}: {count!r}")
        if count < 0:
            raise ValueError(f"fusion_passes.expect: a count is 0 or more, got {name}={count}")
    return ",".join(f"{name}={count}" for name, count in sorted(value.items()))


def parse(text: str) -> dict[str, int]:
    """The counts in "name=24,other=2".

    Raises:
        ValueError: the text is not written so, or names a fusion twice.
    """
    found: dict[str, int] = {}
    for item in (part.strip() for part in text.split(",") if part.strip()):
        name, separator, count = (part.strip() for part in item.partition("="))
        if not name or not separator or not count.isdecimal():
            raise ValueError(f"fusion_passes.expect must be written 'name=24,other=2', got {item!r}")
        if name in found:
            raise ValueError(f"fusion_passes.expect names {name!r} twice")
        found[name] = int(count)
    return found


def check_names(expected: Mapping[str, int], known: Iterable[str], selected: Iterable[str], fusions: str) -> None:
    """Raise a ValueError for names that no fusion has, and for counts that the setting `fusions` rules out."""
    known, selected = list(known), list(selected)
    for name, count in expected.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown fusion {name!r} in fusion_passes.expect.{hint} Known: {', '.join(known)}")
        if count and name not in selected:
            raise ValueError(f"fusion_passes.expect asks for {name}={count}, but fusions={fusions!r} leaves it out")


def complaint(expected: Mapping[str, int], counts: Mapping[str, int]) -> str:
    """How the counts differ from the expected ones, in words; "" where they do not. Other fusions do not matter."""
    found = [
        f"expected {count} {name}, found {counts.get(name, 0)}"
        for name, count in expected.items()
        if counts.get(name, 0) != count
    ]
    return "; ".join(found)


def of_whole_graph(graph: Graph, found: Iterable[Record]) -> list[Record] | None:
    """The records of a forward graph and its subgraphs; None where the pass is at a part of a graph, or at a backward.

    Inductor shows the pass the subgraphs of a graph first, each of them once, and the graph itself last.
    """
    module = graph.owning_module
    if module is None:
        return list(found)
    module.meta[_META] = list(found)
    if _inside_another() or any("tangents" in str(node.target) for node in graph.find_nodes(op="placeholder")):
        return None
    return [record for part in module.modules() for record in getattr(part, "meta", {}).get(_META, ())]


# Inductor's recursion over subgraphs, and that of `explanation`.
_RECURSIONS = ("_recursive_post_grad_passes", "show_recursively")


def _inside_another() -> bool:
    """Whether the recursion over subgraphs is below the outermost graph."""
    depth, frame = 0, inspect.currentframe()
    while frame is not None:
        depth += frame.f_code.co_name in _RECURSIONS
        frame = frame.f_back
    return depth > 1


def graph_breaks() -> int:
    """The graph breaks that Dynamo has counted so far.

    What it cannot trace is "unimplemented" first, and a "graph_break" as soon as it goes on behind it. At a branch that
    depends on a tensor, and where it leaves a whole function to Python, the first is all that there is.
    """
    return sum(sum(counters[kind].values()) for kind in ("graph_break", "unimplemented"))


def where_counted() -> str:
    """What a count refers to, for error messages; with a hint where the model was not one graph."""
    breaks = graph_breaks()
    text = "fusion_passes.expect counts the sites of each graph that is compiled"
    if breaks:
        text += (
            f"; so far there was a graph break {'once' if breaks == 1 else f'{breaks} times'}, which divides a model "
            "into several graphs: fullgraph=True forbids that"
        )
    return text


_warned: set[tuple[str, str, str]] = set()


def warn_if_nothing(found: Iterable[Record]) -> None:
    """Warn where a compile fused nothing, once for each nearest candidate.

    Without a candidate there is one warning, and only while the process has not fused anything: graphs beside the model
    have none either.
    """
    found = list(found)
    if any(record.outcome == "fused" for record in found):
        return
    if not found and any(record.outcome == "fused" for record in records.recall()):
        return
    nearest = min(found, key=_distance, default=None)
    key = (nearest.fusion, nearest.reason, nearest.source) if nearest else ("", "", "")
    if key in _warned:
        return
    _warned.add(key)
    if nearest is None:
        log.warning("fusion_passes fused nothing in a compiled graph: it has no operator from which a search starts")
        return
    others = f" ({len(found) - 1} more in fusion_passes.report())" if len(found) > 1 else ""
    where = nearest.source or nearest.node
    log.warning(
        "fusion_passes fused nothing in a compiled graph. Nearest: %s at %s: %s%s",
        nearest.fusion, where, nearest.reason, others,
    )  # fmt: skip


def _distance(record: Record) -> int:
    """How far a candidate was from being fused: a refusal means the right thing, and some were never looked at."""
    if record.outcome == "refused":
        return 0
    return 2 if record.reason.startswith("not looked at") else 1
