"""What a refusal or near miss says can be done about it; where it is done the site is fused."""

from __future__ import annotations

import pytest
import torch

from fusion_passes import advice, guards
from fusion_passes.fusion import Because, Context, NearMiss, Refusal, Site
from fusion_passes.settings import snapshot
from tests.patterns.hints_copies import CASES as COPIES
from tests.patterns.hints_products import CASES as PRODUCTS
from tests.tracing import trace

CASES = {**PRODUCTS, **COPIES}


@pytest.mark.parametrize("name", CASES)
def test_the_hint_says_what_helps(name: str) -> None:
    wanted = CASES[name]
    report = wanted.site.report(wanted.fusion)
    assert report.counts[wanted.fusion] == 0, str(report)
    said = [r for r in (*report.refusals, *report.near_misses) if wanted.reason in r.reason]
    assert said, f"no reason says {wanted.reason!r}:\n{report}"
    assert all((wanted.hint in r.hint) if wanted.hint else not r.hint for r in said), str(report)
    if wanted.cured is not None:
        after = wanted.cured.report(wanted.fusion)
        assert after.counts[wanted.fusion] >= 1, f"the advice did not help:\n{after}"


def test_writes_and_devices() -> None:
    graph = trace(lambda a, b: (a.sin(), b.sin() * 2), torch.ones(4), torch.ones(4), decompose=False).graph
    first, second = graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    site = Site(first, first, {"a": first.args[0], "b": second.args[0]}, {first, second}, also=(second,))
    with graph.inserting_after(first):
        graph.call_function(torch.ops.aten.mul_.Tensor, (second.args[0], 2))
    reason = guards.mutations(site, Context(graph, snapshot(), []))
    assert isinstance(reason, Because) and reason.hint == "write to b before it is read, or after the last use"
    second.meta["val"] = second.meta["val"].to("meta")
    reason = guards.devices(site)
    assert isinstance(reason, Because) and reason.hint == "move them to one device"


def test_padding_is_advised_where_it_leads_to_a_kernel() -> None:
    assert advice.padded("v", 65, (64, 96, 128)) == "pad v with zeros to 96 channels"
    assert advice.padded("v", 129, (64, 96, 128)) == ""


def test_exceptions_take_a_hint_and_keep_one() -> None:
    for kind in (NearMiss, Refusal):
        assert str(kind("why", "how")) == "why" and kind("why", "how").args[0].hint == "how"
        assert kind(Because("why", "how")).args[0].hint == "how"
        assert not isinstance(kind("why").args[0], Because)
