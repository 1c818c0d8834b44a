"""The pass: fail-open, strict, transactional, and without a trace where nothing matches."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import fusion_passes
from fusion_passes import graph_pass, registry
from fusion_passes.fusion import Fusion
from tests import gates

ON_CPU = {"fusion_passes.reference_on_cpu": True}
aten = torch.ops.aten


class Listing(CustomGraphPass):
    """Keeps the graph as text, after whatever ran before."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, graph: Graph) -> None:
        self.text = str(graph)

    def uuid(self) -> None:
        return None


@contextlib.contextmanager
def planted(**changes: Any) -> Iterator[None]:
    """The gate fusion with some of its stages replaced."""
    known = registry.known()
    original = known["gate_cumsum"]
    registry._fusions["gate_cumsum"] = dataclasses.replace(original, **changes)
    try:
        yield
    finally:
        registry._fusions["gate_cumsum"] = original


def broken(*args: Any) -> Any:
    raise ZeroDivisionError("planted")


def compiled(options: dict[str, Any] | None = None, f: Callable[..., Any] = gates.gate) -> Any:
    return torch.compile(f, backend="fusion_passes", options={**ON_CPU, **(options or {})}, fullgraph=True)


@pytest.mark.parametrize("stage", ["match", "guard", "profit", "replace"])
def test_a_failing_stage_never_breaks_the_compile(stage: str, caplog: pytest.LogCaptureFixture) -> None:
    with planted(**{stage: broken}), caplog.at_level(logging.WARNING):
        torch.testing.assert_close(compiled()(*gates.inputs()), gates.gate(*gates.inputs()))
    report = fusion_passes.report()
    assert report.counts == {} and "ZeroDivisionError: planted" in report.refusals[0].reason
    assert "gate_cumsum failed" in caplog.text


@pytest.mark.parametrize("stage", ["match", "guard", "profit", "replace"])
def test_strict_raises(stage: str) -> None:
    with planted(**{stage: broken}), pytest.raises(Exception, match="planted"):
        compiled({"fusion_passes.strict": True})(*gates.inputs())


def test_sizes_of_a_graph_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fusions look at it: with many guards it takes seconds."""
    counted = mock.Mock(wraps=graph_pass.assignments)
    monkeypatch.setattr(graph_pass, "assignments", counted)
    again = dataclasses.replace(registry.known()["gate_cumsum"], name="again", match=broken)
    monkeypatch.setitem(registry._fusions, "again", again)
    compiled()(*gates.inputs())
    assert {record.fusion for record in fusion_passes.report().records} >= {"gate_cumsum", "again"}
    assert counted.call_count == 1


def test_a_failed_rewrite_leaves_the_graph_as_it_was() -> None:
    def half_done(site: Any, graph: Graph) -> Any:
        graph.call_function(aten.neg.default, (site.leaves["raw"],))
        return broken()

    listings = []
    for stages in ({}, {"replace": half_done}):
        listing = Listing()
        torch._dynamo.reset()
        options = {"fusion_passes.fusions": "gate_cumsum" if stages else "none"}
        with planted(**stages), inductor_config.patch(post_grad_custom_post_pass=listing):
            compiled(options)(*gates.inputs())
        listings.append(listing.text)
    assert listings[0] == listings[1] and "cumsum" in listings[0]


def test_wrong_metadata_is_refused() -> None:
    def transposed(site: Any, graph: Graph) -> Any:
        return fusion_passes.rewrite.call(graph, aten.transpose.int, site.replaced, 0, 1)

    with planted(replace=transposed):
        torch.testing.assert_close(compiled()(*gates.inputs()), gates.gate(*gates.inputs()))
    assert "not provably the graph's" in fusion_passes.report().refusals[0].reason


def test_wrong_strides_are_refused() -> None:
    def restrided(site: Any, graph: Graph) -> Any:
        turned = fusion_passes.rewrite.call(graph, aten.permute.default, site.replaced, [0, 1, 2, 4, 3])
        copied = fusion_passes.rewrite.call(graph, aten.clone.default, turned, memory_format=torch.contiguous_format)
        return fusion_passes.rewrite.call(graph, aten.permute.default, copied, [0, 1, 2, 4, 3])

    with planted(replace=restrided):
        compiled()(*gates.inputs())
    assert "strides" in fusion_passes.report().refusals[0].reason


def test_a_graph_without_a_match_is_left_untouched_node_for_node() -> None:
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x).cumsum(1) * 2

    x = torch.randn(4, 64, 8)
    texts = []
    for fusions in ("default", "none"):
        listing = Listing()
        torch._dynamo.reset()
        with inductor_config.patch(post_grad_custom_post_pass=listing):
            compiled({"fusion_passes.fusions": fusions}, reference)(x)
        texts.append(listing.text)
    assert texts[0] == texts[1]
    assert fusion_passes.report().counts == {} and len(fusion_passes.report().near_misses) == 1


def test_verify_catches_a_wrong_kernel() -> None:
    def wrong(site: Any, graph: Graph) -> Any:
        new = original.replace(site, graph)
        return fusion_passes.rewrite.call(graph, aten.mul.Tensor, new, 1.001)

    original = registry.known()["gate_cumsum"]
    with planted(replace=wrong):
        out = compiled({"fusion_passes.verify": True})(*gates.inputs())
    torch.testing.assert_close(out, gates.gate(*gates.inputs()))
    assert "verify: the fused op differs from the subgraph by 1.0e-03" in fusion_passes.report().refusals[0].reason


def test_verify_accepts_the_right_kernel() -> None:
    compiled({"fusion_passes.verify": True})(*gates.inputs())
    assert fusion_passes.report().counts["gate_cumsum"] == 1


def test_two_sites_in_one_graph() -> None:
    def two(raw: torch.Tensor, a_log: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gates.gate(raw, a_log, bias), gates.gate(raw * 1, a_log + 1, bias)

    args = gates.inputs()
    torch.testing.assert_close(compiled(f=two)(*args), two(*args))
    assert fusion_passes.report().counts["gate_cumsum"] == 2


def test_the_source_line_is_that_of_the_model() -> None:
    compiled()(*gates.inputs())
    record = fusion_passes.report().fused[0]
    path, line = record.source.rsplit(":", 1)
    assert path.endswith("gates.py")
    with open(path) as file:
        assert ".cumsum(-2)" in file.readlines()[int(line) - 1]


def test_provenance_reaches_the_new_node() -> None:
    class Look(Listing):
        def __call__(self, graph: Graph) -> None:
            node = graph.find_nodes(op="call_function", target=torch.ops.fusion_passes.gate_cumsum.default)[0]
            self.text = node.meta["stack_trace"]

    look = Look()
    with inductor_config.patch(post_grad_custom_post_pass=look):
        compiled()(*gates.inputs())
    assert "gates.py" in look.text


def test_registering_twice_under_one_name_is_an_error() -> None:
    fusion = registry.known()["gate_cumsum"]
    assert fusion_passes.register(fusion) is fusion
    with pytest.raises(ValueError, match="already registered"):
        fusion_passes.register(dataclasses.replace(fusion))
    with pytest.raises(TypeError, match="takes a fusion_passes.Fusion, got str"):
        fusion_passes.register("gate_cumsum")  # type: ignore[arg-type]


def test_a_declaration_is_checked() -> None:
    stage: dict[str, Any] = {"match": broken, "replace": broken, "doc": ""}
    with pytest.raises(ValueError, match="must be an identifier"):
        Fusion(name="my fusion", anchors=(aten.cumsum.default,), **stage)
    with pytest.raises(ValueError, match="names no anchors"):
        Fusion(name="mine", anchors=(), **stage)
    with pytest.raises(TypeError, match="must be overloads"):
        Fusion(name="mine", anchors=(aten.cumsum,), **stage)  # type: ignore[arg-type]


def test_unwanted_anchors_leave_no_record() -> None:
    with planted(wants=lambda anchor: False, match=broken):
        compiled({"fusion_passes.strict": True, "fusion_passes.fusions": "gate_cumsum"})(*gates.inputs())
    assert not fusion_passes.report().records


def test_larger_fusions_come_before_those_they_absorb() -> None:
    small = dataclasses.replace(registry.known()["gate_cumsum"], name="small")
    large = dataclasses.replace(small, name="large", absorbs=("small",))
    assert [f.name for f in registry._absorbers_first([small, large])] == ["large", "small"]


def test_what_does_not_pay_can_be_fused_all_the_same() -> None:
    def pointwise_input(raw: torch.Tensor, a_log: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return gates.gate(raw.relu(), a_log, bias)

    (refused,) = fusion_passes.explain(pointwise_input, *gates.inputs()).refusals
    assert "computed by a pointwise node" in refused.reason and "always_profitable" in refused.hint
    settings: Any = fusion_passes.config.patch
    with settings(always_profitable=True):
        assert fusion_passes.explain(pointwise_input, *gates.inputs()).counts["gate_cumsum"] == 1
