"""The `verify` setting, for all fusions: right ops pass, a planted wrong one is refused and reported."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from fusion_passes import registry, rewrite
from fusion_passes.fusion import Refusal
from fusion_passes.testing import assert_same, run_fused
from fusion_passes.verify import _compare
from tests.support.sites import SITES

aten = torch.ops.aten

# Copies that are left out need no op, and the algebra of views decides about them.
NAMES = [name for name, site in SITES.items() if not site.writes]


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


def wrong(site: Any, graph: Graph) -> list[Node]:
    """What the fusion builds, its first result off by an eighth: a step of float8."""
    built = registry.known()["original"].replace(site, graph)
    first, *rest = [built] if isinstance(built, Node) else built
    value = first.meta["val"]
    off = rewrite.call(graph, aten.mul.Tensor, rewrite.call(graph, aten.to.dtype, first, torch.float32), 1.125)
    off = rewrite.call(graph, aten.add.Tensor, off, 1e-2)
    return [rewrite.call(graph, aten.to.dtype, off, value.dtype), *rest]


@pytest.mark.parametrize("name", NAMES)
def test_a_right_op_is_accepted(name: str) -> None:
    _, report = run_fused(SITES[name].function, *SITES[name].inputs(24), verify=True, always_profitable=True)
    assert report.counts[name] == 1, report


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_op_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SITES[name].inputs(24)
    original = registry.known()[name]
    monkeypatch.setitem(registry._fusions, name, dataclasses.replace(original, replace=wrong))
    monkeypatch.setattr(registry, "known", lambda known=registry.known(): {**known, "original": original})
    found, report = run_fused(SITES[name].function, *arguments, verify=True, always_profitable=True, fusions=name)
    assert report.counts[name] == 0 and "verify: the fused op differs" in report.refusals[0].reason, report
    results, expected = ([x.float() for x in tree_leaves(t)] for t in (found, SITES[name].function(*arguments)))
    assert_same(results, expected)


def test_infinities_do_not_hide_a_difference() -> None:
    """As the masked scores of an indexer."""
    fusion = registry.known()["index_score"]
    values = torch.randn(8, 8, dtype=torch.float64)
    hidden = values.masked_fill(torch.ones(8, 8).triu(1) > 0, -math.inf)
    _compare(fusion, hidden.clone(), hidden)
    changes: list[tuple[Tensor, str]] = [
        (hidden * 1.1, "differs from the subgraph by 1.0e-01"),
        (-hidden, "infinite in different places"),
        (values, "infinite in different places"),
        (torch.where(hidden.isinf(), math.nan, hidden), "NaN in different places"),
    ]
    for actual, reason in changes:
        with pytest.raises(Refusal, match=reason):
            _compare(fusion, actual, hidden)
