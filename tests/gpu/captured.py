"""An op in compiled code, eager and captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fusion_passes.lowering import inlining


def assert_compiled_and_captured(op: Callable[..., Any], sets: Iterable[tuple[Any, ...]], dynamic: bool) -> None:
    """Compiled, the op gives the same bits as by itself: replayed for all `sets` of arguments, and not inlined."""
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, dynamic=dynamic)
    for args in sets:
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            compiled(*args)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = compiled(*args)
        graph.replay()
        for a, b in zip(found, op(*args)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    with inlining(False):
        opaque = torch.compile(lambda *args: op(*args), fullgraph=True)
        for a, b in zip(opaque(*args), op(*args)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
