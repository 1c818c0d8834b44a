"""The wrapper that Inductor generates for a sparse-attention indexer: one launch, no tensor of products per head."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_passes.graph_pass import FusionPass
from fusion_passes.settings import snapshot
from tests.support import fake_cuda
from tests.support.fake_cuda import allocated, body, launches

KERNEL = "index_score_kernel"
BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 96, 160, 16, 64


@pytest.fixture(autouse=True)
def _supported() -> None:
    fake_cuda.require()


def by_mask(q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    """The spelling of `transformers`."""
    scores = torch.relu(torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1)) * WIDTH**-0.5)
    total = torch.matmul(w.unsqueeze(-2), scores).squeeze(-2)
    return total.masked_fill(~mask, float("-inf")).topk(8).indices


def by_positions(q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    scores = (torch.matmul(q, k.mT.unsqueeze(1)).relu().float() * w.unsqueeze(-1)).sum(2)
    last = torch.arange(q.shape[1], device=q.device) + (k.shape[1] - q.shape[1])
    hidden = torch.arange(k.shape[1], device=q.device) > last[:, None]
    return scores.masked_fill(hidden, torch.finfo(torch.float32).min).topk(8).indices


def from_one_projection(x: Tensor, weight: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Queries that are a window of a larger product."""
    mixed = torch.matmul(x, weight).unflatten(-1, (HEADS + 2, WIDTH))
    scores = torch.relu(torch.matmul(mixed[:, :, 2:].float(), k.mT.float().unsqueeze(1)))
    return (scores * w.unsqueeze(-1)).sum(2).topk(8).indices


def arguments() -> list[Tensor]:
    q, k = torch.randn(BATCH, QUERIES, HEADS, WIDTH).bfloat16(), torch.randn(BATCH, KEYS, WIDTH).bfloat16()
    return [q, k, torch.randn(BATCH, QUERIES, HEADS), torch.ones(BATCH, QUERIES, KEYS, dtype=torch.bool)]


@functools.cache
def usual(function: Callable[..., Any], dynamic: tuple[int, ...]) -> str:
    return code_of(function, arguments(), dynamic)


def code_of(function: Callable[..., Any], args: list[Tensor], dynamic: tuple[int, ...] = (), fused: bool = True) -> str:
    chosen = FusionPass(snapshot({"strict": True, "fusions": "index_score" if fused else "none"}))
    # Constants are folded on the device, which is not there.
    options = {"post_grad_custom_pre_pass": chosen, "joint_graph_constant_folding": False}
    return fake_cuda.wrapper_code(function, args, dynamic=dynamic, options=options)


def constants(code: str) -> dict[str, Any]:
    """The numbers and names that are compiled into the kernel."""
    definition = code[code.index(KERNEL) : code.index("def call(")]
    return {name: ast.literal_eval(value) for name, value in re.findall(r"'([A-Z_]+)': ([^,}]+)", definition)}


@pytest.mark.parametrize("dynamic", [(), (0, 2, 3)])
def test_one_launch_and_no_products(dynamic: tuple[int, ...]) -> None:
    code = usual(by_mask, dynamic)
    assert len(launches(code, KERNEL)) == 1 and "torch.ops.fusion_passes" not in code
    assert not [line for line in body(code) if "extern_kernels." in line]
    for line in allocated(code):
        assert not re.search(rf"\b{HEADS}\b", line), line


def test_without_the_fusion_there_are_products() -> None:
    code = code_of(by_positions, arguments(), fused=False)
    assert [line for line in allocated(code) if str(HEADS * QUERIES) in line]


def test_infinity_is_no_name_in_generated_code() -> None:
    """Inductor prints it as `inf`, which nothing defines."""
    found = constants(usual(by_mask, ()))
    assert found["FILL"] == -1.0 and found["INFINITE"] is True
    found = constants(usual(by_positions, ()))
    assert found["FILL"] == torch.finfo(torch.float32).min and found["INFINITE"] is False


@pytest.mark.parametrize("dynamic", [(), (0, 1, 2)])
def test_a_causal_mask_takes_no_memory(dynamic: tuple[int, ...]) -> None:
    code = usual(by_positions, dynamic)
    (launch,) = launches(code, KERNEL)
    assert not [line for line in allocated(code) if "torch.bool" in line]
    assert len(launches(code, "triton_")) == 0
    assert bool(re.search(r"\bs\d+\b", launch)) == bool(dynamic)


def test_a_window_of_a_projection_is_read_in_place() -> None:
    _, k, w, _ = arguments()
    args = [torch.randn(BATCH, QUERIES, 32).bfloat16(), torch.randn(32, (HEADS + 2) * WIDTH).bfloat16(), k, w]
    code = code_of(from_one_projection, args)
    assert len(launches(code, KERNEL)) == 1 and launches(code, "triton_") == []
    found = constants(code)
    assert found["Q_S"] == (HEADS + 2) * WIDTH and found["Q_H"] == WIDTH


def test_only_the_scores_count_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written = fake_cuda.written_arguments(monkeypatch)
    code_of(by_mask, arguments())
    assert written == [["out_ptr"]]
