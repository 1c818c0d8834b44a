"""How often a function is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


def graphs(
    function: Callable[..., Any],
    fusions: str,
    inputs: Iterable[tuple[Any, ...]],
    dynamic: Sequence[tuple[int, int]],
    check: Callable[[Any, tuple[Any, ...]], None],
) -> int:
    """The number of graphs that calls with all of `inputs` compile.

    Args:
        function: compiled anew, fullgraph.
        fusions: the setting of that name.
        inputs: of one call after the other.
        dynamic: pairs of argument and axis that may be symbolic from the first call on.
        check: is called with each result and its inputs.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options: dict[str, Any] = {"fusion_passes.reference_on_cpu": True, "fusion_passes.fusions": fusions}
    compiled = torch.compile(function, backend="fusion_passes", options=options, fullgraph=True)
    for args in inputs:
        for position, axis in dynamic:
            torch._dynamo.maybe_mark_dynamic(args[position], axis)
        check(compiled(*args), args)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
