"""What happened at each place the pass looked at, kept where Inductor's caches replay it.

On a warm cache no pass runs. Inductor stores, with every compiled graph, by how much the compile changed
`counters["inductor"]`, and adds the same amounts again when the graph comes from a cache. Records are therefore
kept as keys of that counter, in JSON: a record counts once per compiled graph, cold or warm, in this process or
the next. `torch._dynamo.utils.counters.clear()` clears them too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from typing import Literal

from torch._dynamo.utils import counters
from torch._logging import trace_structured
from torch.fx import Node

_KEY = "fusion_passes.record "

Outcome = Literal["fused", "refused", "near_miss"]

_PACKAGE = os.path.dirname(__file__) + os.sep

# One frame of a stack trace as the exporters of torch write it.
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@dataclasses.dataclass(frozen=True)
class Record:
    """One candidate site and what became of it.

    Attributes:
        fusion: name of the fusion.
        outcome: "fused", "refused" (it means what the fusion computes, but was left alone) or "near_miss".
        reason: why it was left alone; for fused sites what was found (shapes and constants).
        source: "file:line" of the model's code that the anchor came from, or "" where torch kept none.
        node: name of the anchor in the graph.
        graph: a short key of the graph, to tell equal sites of different graphs apart.
        saved_bytes: estimated memory traffic saved per call, for fused sites.
        saved_launches: estimated kernel launches saved per call, for fused sites.
        saved_memory: estimated bytes that intermediates held at once and no longer do, for fused sites.
        hint: what would make a site match that was left alone, or "" where the fusion does not say.
    """

    fusion: str
    outcome: Outcome
    reason: str
    source: str
    node: str
    graph: str = ""
    saved_bytes: int | None = None
    saved_launches: int | None = None
    saved_memory: int | None = None
    hint: str = ""


def remember(records: Iterable[Record]) -> None:
    """Add records to the store that caches replay."""
    for record in records:
        counters["inductor"][_KEY + json.dumps(dataclasses.asdict(record), sort_keys=True)] += 1


def recall() -> list[Record]:
    """All records of this process, in the order of their first appearance, repeated as often as compiled."""
    found: list[Record] = []
    for key, count in list(counters["inductor"].items()):
        if isinstance(key, str) and key.startswith(_KEY):
            found += [Record(**json.loads(key[len(_KEY) :]))] * count
    return found


def trace(found: Iterable[Record]) -> None:
    """Put the records of a compile into the trace that `TORCH_TRACE` asks for, where `tlparse` shows them."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "fusion_passes_report", "encoding": "json"},
        payload_fn=lambda: json.dumps([dataclasses.asdict(record) for record in found]),
    )


def source_of(node: Node) -> str:
    """"file:line" of the innermost frame of the model's code in the node's stack trace, or ""."""
    for candidate in (node, *node.all_input_nodes):
        frames = _FRAME.findall(candidate.meta.get("stack_trace") or "")
        ours = [f for f in frames if "/torch/" not in f[0].replace("\\", "/")] or frames
        ours = [f for f in ours if not f[0].startswith(_PACKAGE)] or ours  # the caller of an op, not its wrapper
        if ours:
            return f"{ours[-1][0]}:{ours[-1][1]}"
    return ""
