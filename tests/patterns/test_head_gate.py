"""The head_gate fusion: found whatever the spelling, refused with a reason where it means something else."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusion_passes
from fusion_passes.ops.head_gate import OP
from fusion_passes.testing import assert_refuses, run_fused
from tests.patterns.head_gate_cases import BF16, F32, Case, Entry, assert_close
from tests.patterns.head_gate_lookalikes import LOOKALIKES
from tests.patterns.head_gate_spellings import SPELLINGS
from tests.support import recompiles
from tests.support.versions import not_on_2_11

NAME = "head_gate"


def check(entry: Entry, actual: Any, inputs: tuple[Tensor, ...]) -> None:
    case = entry.case
    assert_close(actual, case.meaning(inputs), case.dtype, rounded=case.weights != F32)


@pytest.mark.parametrize("name", SPELLINGS)
@torch.no_grad()
def test_spellings_mean_what_they_claim(name: str) -> None:
    entry = SPELLINGS[name]
    inputs = entry.inputs()
    check(entry, entry.function(*inputs), inputs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
@torch.no_grad()
def test_spellings_are_found_and_keep_their_value(name: str, dynamic: bool) -> None:
    not_on_2_11("traces lerp as a selection by a tensor", name == "sum_of_multiples")
    entry = SPELLINGS[name]
    inputs = entry.inputs()
    if dynamic:
        if entry.case.static or entry.case.tokens == 1:
            pytest.skip("the spelling fixes the number of tokens")
        torch._dynamo.mark_dynamic(inputs[0], 0 if entry.case.flat else 1)
        if "t" in entry.case.q:
            torch._dynamo.mark_dynamic(inputs[2], entry.case.q.index("t"))
    actual, report = run_fused(entry.function, *inputs, fusions=NAME)
    assert report.counts[NAME] == 1, str(report)
    assert f"times {entry.case.scale:.6g}" in report.fused[0].reason, str(report)
    assert ("scale per row and head" in report.fused[0].reason) == bool(entry.case.q), str(report)
    check(entry, actual, inputs)
    assert actual.stride() == entry.function(*inputs).stride()


@pytest.mark.parametrize("name", LOOKALIKES)
@torch.no_grad()
def test_lookalikes_are_left_alone(name: str) -> None:
    not_on_2_11("has another order of products, and so another reason", name == "two_tensors")
    entry = LOOKALIKES[name]
    report = assert_refuses(entry.function, *entry.inputs(), fusion=NAME, reason=entry.reason, fusions=NAME)
    assert entry.reason or not report.records, str(report)


def rewritten(function: Any, inputs: tuple[Any, ...]) -> list[torch.fx.Node]:
    """The nodes of the graph after the pass."""
    from fusion_passes.explanation import tracing_backend
    from fusion_passes.graph_pass import FusionPass
    from fusion_passes.settings import snapshot

    nodes: list[torch.fx.Node] = []

    class Spy(FusionPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            nodes.extend(graph.nodes)

    settings = snapshot({"strict": True, "reference_on_cpu": True, "fusions": NAME})
    torch._dynamo.reset()
    torch.compile(function, backend=tracing_backend(Spy(settings), run_rewritten=True), fullgraph=True)(*inputs)
    return nodes


@pytest.mark.parametrize(
    "name", ["hugging_face", "both_upcast", "upcast_after_a_view", "einsum", "heads_first_and_back"]
)
@torch.no_grad()
def test_operands_are_read_as_they_are(name: str) -> None:
    """No upcast copy of an operand is left in the graph, and no product."""
    entry = SPELLINGS[name]
    nodes = rewritten(entry.function, entry.inputs())
    (call,) = [n for n in nodes if n.target is OP]
    x, weight = (n.meta["val"] for n in call.args[:2] if isinstance(n, torch.fx.Node))
    assert (x.dtype, weight.dtype) == (entry.case.rows, entry.case.weights) and x.stride(-1) == 1
    targets = {str(n.target) for n in nodes}
    assert not any(word in target for target in targets for word in ("mm", "convert_element_type", "clone"))


@pytest.mark.parametrize(
    "name, product", [("hugging_face", F32), ("hugging_face_in_bfloat16", BF16), ("both_upcast", F32)]
)
@torch.no_grad()
def test_the_product_is_rounded_as_in_the_graph(name: str, product: torch.dtype) -> None:
    entry = SPELLINGS[name]
    (call,) = [n for n in rewritten(entry.function, entry.inputs()) if n.target is OP]
    assert call.args[4:6] == (product, F32)


@torch.no_grad()
def test_exactly_the_eager_result_in_bfloat16() -> None:
    entry = SPELLINGS["hugging_face_in_bfloat16"]
    inputs = entry.inputs()
    actual, _ = run_fused(entry.function, *inputs, fusions=NAME)
    assert torch.equal(actual, entry.function(*inputs))


@torch.no_grad()
def test_a_part_of_a_stack_of_weights() -> None:
    def f(x: Tensor, stacked: Tensor) -> Tensor:
        return F.linear(x.float(), stacked.split(8)[1]) * 0.3

    x, weight = Case(weights=F32).inputs()
    inputs = (x, torch.cat([weight * 2, weight, weight]))
    actual, report = run_fused(f, *inputs, fusions=NAME)
    assert report.counts[NAME] == 1, str(report)
    torch.testing.assert_close(actual, f(*inputs), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_two_layers() -> None:
    def f(x: Tensor, weight: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x.float(), weight) * 0.3, F.linear(x, other).float() * 0.7

    x, weight = Case(weights=F32).inputs()
    inputs = (x, weight, weight.bfloat16())
    actual, report = run_fused(f, *inputs, fusions=NAME)
    assert report.counts[NAME] == 2, str(report)
    for found, wanted in zip(actual, f(*inputs)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_upcast_that_others_need_stays() -> None:
    def f(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float() * 0.5
        return F.linear(wide, weight) * 0.3, wide.cumsum(1)

    inputs = Case(weights=F32).inputs()
    actual, report = run_fused(f, *inputs, fusions=NAME)
    assert report.counts[NAME] == 1 and "times 0.15," in report.fused[0].reason
    for found, wanted in zip(actual, f(*inputs)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_follows_the_scaling_stays() -> None:
    def f(x: Tensor, weight: Tensor) -> Tensor:
        return torch.relu(F.linear(x.float(), weight) * 0.3).sum(-1)

    inputs = Case(weights=F32).inputs()
    actual, report = run_fused(f, *inputs, fusions=NAME)
    assert report.counts[NAME] == 1, str(report)
    torch.testing.assert_close(actual, f(*inputs))


@torch.no_grad()
def test_a_dropped_rounding_follows_inductor() -> None:
    entry = SPELLINGS["rounded_in_between"]
    with torch._inductor.config.patch(emulate_precision_casts=True):
        assert_refuses(entry.function, *entry.inputs(), fusion=NAME, reason="emulate_precision_casts", fusions=NAME)
        _, report = run_fused(SPELLINGS["hugging_face"].function, *SPELLINGS["hugging_face"].inputs(), fusions=NAME)
    assert report.counts[NAME] == 1


@torch.no_grad()
def test_tf32_where_it_is_allowed() -> None:
    entry = SPELLINGS["float32"]
    torch.set_float32_matmul_precision("high")
    try:
        assert_refuses(entry.function, *entry.inputs(), fusion=NAME, reason="TF32 is allowed", fusions=NAME)
        _, report = run_fused(SPELLINGS["hugging_face"].function, *SPELLINGS["hugging_face"].inputs(), fusions=NAME)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert report.counts[NAME] == 1


@torch.no_grad()
def test_a_product_saved_for_the_backward_pass_is_left_alone() -> None:
    def f(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
        return F.linear(x.float(), weight) * 0.3 * q

    x, weight, q = Case(weights=F32, q="bth").inputs()
    with torch.enable_grad():
        actual, report = run_fused(f, x, weight, q.requires_grad_(), fusions=NAME)
        (gradient,) = torch.autograd.grad(actual.sum(), q)
    torch.testing.assert_close(gradient, F.linear(x.float(), weight) * 0.3)
    torch.testing.assert_close(actual, f(x, weight, q))
    assert report.counts[NAME] <= 1


@torch.no_grad()
def test_verified_on_random_inputs() -> None:
    for name in ("hugging_face", "serving_engine", "heads_first_with_scales"):
        entry = SPELLINGS[name]
        _, report = run_fused(entry.function, *entry.inputs(), fusions=NAME, verify=True)
        assert report.counts[NAME] == 1, str(report)


@torch.no_grad()
def test_tokens_cause_no_recompile_and_no_guard() -> None:
    entry = SPELLINGS["serving_engine"]
    right = functools.partial(check, entry)
    compiles = {}
    for fusions in ("none", NAME):
        inputs = [entry.case.inputs(tokens=tokens) for tokens in (5, 6, 64, 65, 3)]
        compiles[fusions] = recompiles.graphs(entry.function, fusions, inputs, [(0, 1), (2, 1)], right)
    assert compiles[NAME] == compiles["none"] == 1
    assert fusion_passes.report().counts[NAME] == 1


@torch.no_grad()
def test_small_products_where_they_are_asked_for() -> None:
    entry = LOOKALIKES["few_columns"]
    inputs = entry.inputs()
    actual, report = run_fused(entry.function, *inputs, fusions=NAME, always_profitable=True)
    assert report.counts[NAME] == 1
    torch.testing.assert_close(actual, entry.function(*inputs))


@torch.no_grad()
def test_real_widths() -> None:
    x, weight = torch.randn(1, 3, 7168).bfloat16(), torch.randn(64, 7168) / 80
    _, report = run_fused(SPELLINGS["hugging_face"].function, x, weight, fusions=NAME)
    (fused,) = report.fused
    assert fused.reason.startswith("7168 columns to 64 heads, bfloat16 rows and float32 weights, times 0.353553")
    # The copy of x in float32 and the product, each written and read.
    assert fused.saved_launches == 2 and fused.saved_bytes == 2 * 4 * (3 * 7168 + 3 * 64)
