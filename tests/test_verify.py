"""The `verify` setting, for all fusions: right ops pass, a planted wrong one is refused and reported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from fusion_passes import registry, rewrite
from fusion_passes.fusion import Refusal
from fusion_passes.ops import rotate_pairs
from fusion_passes.testing import assert_same, run_fused
from fusion_passes.verify import _compare
from tests.patterns.test_redundant_copy_rotations import SPELLINGS as ROTATIONS
from tests.patterns.test_redundant_copy_rotations import inputs as rotated
from tests.support.sites import SITES

aten = torch.ops.aten

# Copies that are left out need no op, and the algebra of views decides about them; for rotations see below.
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
    known = registry.known()
    monkeypatch.setattr(registry, "known", lambda: {**known, "original": original})
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


# One write and two, pairs of halves and of neighbours, there and back, into an input and a product, and per number.
WRITTEN = ("neox", "by_halves", "by_neighbours", "back_written_out", "on_a_product", "different_halves")


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_right_rotation_is_accepted(name: str, dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in rotated()]
    _, report = run_fused(ROTATIONS[name], *given, verify=True, always_profitable=True)
    assert report.counts["redundant_copy"] == 1, report


def test_a_right_rotation_of_any_number_of_tokens_is_accepted() -> None:
    given = SITES["rotate_pairs"].marked(24, min=2, max=4096)
    _, report = run_fused(SITES["rotate_pairs"].function, *given, verify=True)
    assert report.counts["redundant_copy"] == 1, report


def _turned_back(pairs: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    pairs.copy_(rotate_pairs.reference(pairs, cos, sin, not inverse))


def _last_row_forgotten(pairs: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    found = rotate_pairs.reference(pairs, cos, sin, inverse)
    pairs[:, :-1, :-1] = found[:, :-1, :-1]


def _beside_its_place(pairs: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """Right, but one element of the channels that are not rotated changes too."""
    pairs.copy_(rotate_pairs.reference(pairs, cos, sin, inverse))
    torch.as_strided(pairs, (1,), (1,), pairs.storage_offset() + 8).add_(1)


@pytest.fixture(params=[_turned_back, _last_row_forgotten, _beside_its_place], ids=lambda f: f.__name__.strip("_"))
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A wrong op in the place of `rotate_pairs_`."""
    library = torch.library.Library("fusion_passes_planted", "FRAGMENT")
    library.define("rotate_pairs_(Tensor(a!) pairs, Tensor cos, Tensor sin, bool inverse=False) -> ()")
    library.impl("rotate_pairs_", request.param, "CPU")
    torch.library.register_fake("fusion_passes_planted::rotate_pairs_", rotate_pairs.check_arguments, lib=library)
    monkeypatch.setattr(rotate_pairs, "OP", torch.ops.fusion_passes_planted.rotate_pairs_.default)
    yield
    library._destroy()


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("name", ["neox", "by_neighbours", "on_a_product"])
def test_a_wrong_rotation_is_refused(name: str) -> None:
    (ours, cos, sin), (theirs, *_) = rotated(), rotated()
    found, report = run_fused(ROTATIONS[name], ours, cos, sin, verify=True, always_profitable=True)
    assert report.counts["redundant_copy"] == 0, report
    assert any("verify: the fused op differs" in record.reason for record in report.refusals), report
    expected = ROTATIONS[name](theirs, cos, sin)
    assert_same([found, ours], [expected, theirs])
    _, unchecked = run_fused(ROTATIONS[name], ours, cos, sin, always_profitable=True)
    assert unchecked.counts["redundant_copy"] == 1, "nothing was planted"
