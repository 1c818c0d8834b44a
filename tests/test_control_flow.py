"""Sites in the branches of `torch.cond`, for all fusions: found in each of them, and results are eager's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fusion_passes
from fusion_passes.explanation import explain, tracing_backend
from fusion_passes.graph_pass import FusionPass
from fusion_passes.settings import snapshot
from fusion_passes.testing import assert_same
from tests.support.sites import SITES, Site, fusion_of
from tests.support.versions import not_on_2_11

TOKENS = 24
OWN: dict[str, Any] = {"reference_on_cpu": True, "strict": True, "always_profitable": True}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def in_both_branches(site: Site) -> Callable[..., list[Tensor]]:
    """The site in each branch, whose results differ."""

    def found(given: tuple[Tensor, ...]) -> list[Tensor]:
        # Without a copy torch 2.13 takes the views in a matrix product for aliases of the branch's inputs.
        own = given if site.writes else [x * 1 for x in given]
        return [x.float().contiguous() for x in tree_leaves(site.function(*own))]

    def function(chosen: Tensor, *given: Tensor) -> list[Tensor]:
        branches = (lambda *xs: [x * 2 for x in found(xs)], lambda *xs: [x + 1 for x in found(xs)])
        return torch.cond(chosen > 0, *branches, given)

    return function


def check(compiled: Callable[..., Any], name: str) -> None:
    """Both branches give eager's results, and leave behind what eager does."""
    function = in_both_branches(SITES[name])
    for chosen in (1.0, -1.0):
        ours, theirs = SITES[name].inputs(TOKENS), SITES[name].inputs(TOKENS)
        actual, expected = compiled(torch.tensor(chosen), *ours), function(torch.tensor(chosen), *theirs)
        assert_same((actual, ours), (expected, theirs), 1e-4, 1e-4)


@pytest.mark.parametrize("name", SITES)
def test_sites_in_both_branches(name: str) -> None:
    not_on_2_11("takes no branches that write into inputs", name in ("redundant_copy", "rotate_pairs"))
    # The count is that of the whole graph, branches included.
    explained = FusionPass(snapshot({**OWN, "fusions": fusion_of(name), "expect": f"{fusion_of(name)}=2"}))
    backend = tracing_backend(explained, run_rewritten=True)
    check(torch.compile(in_both_branches(SITES[name]), backend=backend, fullgraph=True), name)
    assert [record.outcome for record in explained.found] == ["fused", "fused"], explained.found


def test_a_write_to_an_input_of_a_branch_with_generated_code() -> None:
    not_on_2_11("takes no branches that write into inputs")
    options = {f"fusion_passes.{key}": value for key, value in OWN.items()}
    function = in_both_branches(SITES["rotate_pairs"])
    check(torch.compile(function, backend="fusion_passes", options=options, fullgraph=True), "rotate_pairs")
    assert fusion_passes.report().counts == {"redundant_copy": 2}


def test_explain_looks_into_branches() -> None:
    report = explain(in_both_branches(SITES["full_topk"]), torch.tensor(1.0), *SITES["full_topk"].inputs(TOKENS))
    assert report.counts == {"full_topk": 2}, report
