"""Mutation test of the matcher: one node of a matched graph is changed, and whatever is fused keeps the value."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from fusion_passes.graph_pass import FusionPass
from fusion_passes.settings import snapshot
from tests.patterns.delta_rule_intra_spellings import SPELLINGS
from tests.patterns.test_gate_cumsum_mutants import captured, copied, mutants, mutated, same

# A rounding to bfloat16 may be dropped, as Inductor drops it.
TOLERANCE = collections.defaultdict(lambda: 1e-4, {"round trip through bfloat16": 3e-2, "cast target bfloat16": 3e-2})

# spelling, mutants that run
GRAPHS = {
    "solved_apart": 40,
    "solved_together": 30,
    "forward_substitution": 4,
    "pairs_chunk_by_chunk": 10,
    "channels_with_pairs": 20,
}


def drawn(name: str, seed: int) -> list[Tensor]:
    """Operands with some short rows of k and q, strong decays and a beta of zero."""
    k, v, g, beta, q = SPELLINGS[name].inputs(seed=seed, tokens=24, batch=1, key=32)
    for rows in (k, q):
        rows[:, ::5] *= 1e-2
    g[:, ::7] *= 30
    beta[:, 3] = 0
    return [k, v, g, beta, q]


@pytest.mark.parametrize("name", GRAPHS)
@torch.no_grad()
def test_a_changed_graph_is_refused_or_keeps_its_value(name: str) -> None:
    function: Callable[..., Any] = SPELLINGS[name].function
    tracing = captured(function, tuple(drawn(name, 0)))
    order = [next(i for i, t in enumerate(drawn(name, 0)) if torch.equal(t, x)) for x in tracing.inputs]
    settings = snapshot({"strict": True, "reference_on_cpu": True, "fusions": "delta_rule_intra"})
    survivors, counts = [], collections.Counter[str]()
    mode = FakeTensorMode()
    changes = list(mutants(tracing.module.graph))
    random.Random(0).shuffle(changes)
    for index, (node, kind, change) in enumerate(changes):
        if counts["mutants"] == GRAPHS[name]:
            break
        module = mutated(tracing, node, change, mode)
        if module is None:
            continue
        counts["mutants"] += 1
        rewritten = GraphModule(module, copied(module.graph))
        explained = FusionPass(settings)
        explained(rewritten.graph)
        if not any(record.outcome == "fused" for record in explained.found):
            continue
        counts["fused"] += 1
        rewritten.recompile()
        inputs = [drawn(name, 1 + index)[i] for i in order]
        try:
            expected = module(*inputs)
        except RuntimeError:  # fake tensors let more pass
            continue
        if not same(rewritten(*inputs), expected, TOLERANCE[kind]):
            survivors.append(f"{kind} at {node}: {explained.found}\n{module.graph}")
    assert not survivors, "\n\n".join(survivors[:5]) + f"\n{len(survivors)} wrong rewrites"
    assert counts["mutants"] == GRAPHS[name] and counts["fused"] >= 1, counts
