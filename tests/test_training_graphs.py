"""Inputs that require gradients, for all fusions: gradients are eager's, and what is saved is a reason to refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fusion_passes.reports import Report
from fusion_passes.testing import assert_same, run_fused
from tests.support.sites import SITES, Site, fusion_of

Outcome = tuple[list[Tensor], list[Tensor | None], Report | None]


def outcome(call: Callable[..., Any], arguments: list[Tensor], training: list[bool]) -> Outcome:
    """Results, then gradients of a weighted sum of their squares and written arguments, and the report if any."""
    given = [x.clone().requires_grad_(trained) for x, trained in zip(arguments, training)]
    result = call(*given)
    report = result[1] if isinstance(result, tuple) and isinstance(result[1], Report) else None
    found = [x.float() for x in tree_leaves(result if report is None else result[0])]
    loss = torch.stack([x.square().sum() * (i + 1) for i, x in enumerate(found)]).sum()
    loss.backward()
    return [x.detach() for x in (*found, given[0])], [x.grad for x in given if x.is_leaf], report


def checked(function: Callable[..., Any], arguments: list[Tensor], training: list[bool]) -> Report:
    expected = outcome(function, arguments, training)
    own = {"always_profitable": True}
    actual = outcome(lambda *given: run_fused(function, *given, **own), arguments, training)
    assert actual[2] is not None
    assert_same(actual[:2], expected[:2], 1e-4, 1e-4)
    assert [x is None for x in actual[1]] == [x is None for x in expected[1]]
    return actual[2]


def arguments_of(name: str) -> tuple[Site, list[Tensor]]:
    site = SITES[name]
    return site, site.inputs(32)


# What is written to in place and trained is no input that Inductor writes to: there is nothing to look for.
FUNCTIONAL = [name for name, site in SITES.items() if not site.writes]


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_all_arguments_are_trained(name: str) -> None:
    site, arguments = arguments_of(name)
    report = checked(site.function, arguments, [True] * len(arguments))
    assert (report.counts[name] > 0) == site.trains, report
    if not site.trains:
        reasons = [r.reason for r in (*report.refusals, *report.near_misses) if r.fusion == name]
        assert any("saved for the backward pass" in said or "used elsewhere" in said for said in reasons), report


ONE = [("gate_cumsum", 1), ("head_gate", 1), ("head_gate", 2), ("index_score", 1), ("index_score", 2)]


@pytest.mark.parametrize(("name", "index"), [*ONE, ("mla_kv_pack", 1)])
def test_one_argument_is_trained(name: str, index: int) -> None:
    """Weights and scales: other tensors are saved than for the first argument, and others are not."""
    site, arguments = arguments_of(name)
    checked(site.function, arguments, [i == index for i in range(len(arguments))])


def test_updates_of_a_cache_are_trained() -> None:
    site, arguments = arguments_of("redundant_copy")
    checked(site.function, arguments, [False, True, True])


WAYS = [*((name, "detached") for name in SITES), ("index_score", "no_grad"), ("rotate_pairs", "no_grad")]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_a_site_without_gradients_in_a_graph_that_is_trained(name: str, way: str) -> None:
    """As an indexer that selects for an attention: nothing of it is saved, and it is found."""
    site, arguments = arguments_of(name)

    def function(weight: Tensor, *given: Tensor) -> list[Tensor]:
        if way == "detached":
            found = site.function(*(x.detach() for x in given))
        else:
            with torch.no_grad():
                found = site.function(*given)
        return [x.float() * weight.exp() for x in tree_leaves(found)]

    training = [True, *(not site.writes for _ in arguments)]
    report = checked(function, [torch.randn(()), *arguments], training)
    assert report.counts[fusion_of(name)] == 1, report
