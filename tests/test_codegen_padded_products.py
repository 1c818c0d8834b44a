"""What Inductor's own `pad_mm` has padded: the wrappers are those of the products as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from fusion_passes.graph_pass import FusionPass
from fusion_passes.settings import snapshot
from tests.patterns import head_gate_spellings, index_score_spellings
from tests.patterns.index_score_cases import qkw
from tests.support import fake_cuda
from tests.support.fake_cuda import body

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _supported() -> None:
    fake_cuda.require()


class Watched(CustomGraphPass):
    """The pass, and how often the graph that it is shown pads."""

    def __init__(self, fusions: str) -> None:
        self.own = FusionPass(snapshot({"strict": True, "fusions": fusions, "always_profitable": True}))
        self.pads = 0

    def __call__(self, graph: Graph) -> None:
        self.pads += len(graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default))
        self.own(graph)

    def uuid(self) -> Any:
        return self.own.uuid()


def launches(function: Callable[..., Any], inputs: Sequence[Tensor], fusions: str) -> tuple[list[str], str]:
    """The kernels and library calls of the wrapper for a graph with padded products, and the wrapper."""
    watched = Watched(fusions)
    options = {"post_grad_custom_pre_pass": watched, "force_shape_pad": True, "joint_graph_constant_folding": False}
    code = fake_cuda.wrapper_code(function, inputs, options=options)
    assert watched.pads, "nothing was padded"
    calls = [line.split("(")[0] for line in body(code) if ".run(" in line or "extern_kernels." in line]
    return calls, code


@pytest.mark.parametrize("tokens", [5, 1027])
@pytest.mark.parametrize("name", ["hugging_face", "serving_engine", "heads_first", "weights_scaled"])
def test_head_gate(name: str, tokens: int) -> None:
    found = head_gate_spellings.SPELLINGS[name]
    calls, _ = launches(found.function, found.case.inputs(tokens=tokens), "head_gate")
    assert len(calls) == 1 and calls[0].startswith("head_gate"), calls


@pytest.mark.parametrize(
    "name", ["two_einsums_with_batches", "weights_as_a_column", "no_selection", "loop_over_heads", "decode"]
)
def test_index_score(name: str) -> None:
    found = index_score_spellings.SPELLINGS[name]
    calls, _ = launches(found.function, found.inputs(), "index_score")
    assert len(calls) == 1 and calls[0].startswith("index_score_kernel"), calls


def test_many_keys() -> None:
    """As in `transformers`; the sum over heads is a padded product too, from whose result the keys are selected."""

    def function(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        scores = torch.relu(torch.matmul(q.float(), k.mT.float().unsqueeze(1)))
        return torch.matmul(w.unsqueeze(-2), scores).squeeze(-2).topk(4).indices

    calls, _ = launches(function, qkw(2, queries=1027, keys=1027)(), "index_score")
    assert len(calls) == 1 and calls[0].startswith("index_score"), calls


def test_a_result_of_the_graph_keeps_the_strides_of_stock() -> None:
    """Inductor copies it into the memory that it would have had; a value that is not returned needs no copy."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.matmul(weight * 0.125, x.mT)

    calls, code = launches(function, head_gate_spellings.SPELLINGS["heads_first"].case.inputs(tokens=1027), "head_gate")
    assert len(calls) == 2 and calls[0].startswith("head_gate") and calls[1].startswith("triton_poi"), calls
    assert "empty_strided_cuda((2, 8, 1027), (8256, 1032, 1), torch.bfloat16)" in code


def test_a_padded_product_that_a_fused_op_reads() -> None:
    def function(x: Tensor, weight: Tensor) -> list[Tensor]:
        pieces = aten.mm.default(x, weight).split([8, 8, 16, 5], dim=-1)[:3]
        return [aten.clone.default(piece, memory_format=torch.contiguous_format) for piece in pieces]

    calls, code = launches(function, [torch.randn(9, 16), torch.randn(16, 37)], "qkv_split")
    assert [call for call in calls if "triton" not in call] == ["extern_kernels.mm", "qkv_split_kernel_0.run"], calls
    assert "empty_strided_cuda((12, 40), (40, 1), torch.float32)" in code and "'X_T': 40," in code
