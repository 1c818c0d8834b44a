"""The wrapper that Inductor generates around a split: one launch for all windows, the tensor read where it lies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_passes.graph_pass import FusionPass
from fusion_passes.settings import snapshot
from tests.support import fake_cuda
from tests.support.fake_cuda import allocated, launches

KERNEL, STOCK = "qkv_split_kernel", "triton_"
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _supported() -> None:
    fake_cuda.require()


def code_of(function: Callable[..., Any], *args: Tensor, dynamic: tuple[int, ...] = (), fused: bool = True) -> str:
    chosen = FusionPass(snapshot({"strict": True, "fusions": "qkv_split" if fused else "none"}))
    return fake_cuda.wrapper_code(function, args, dynamic=dynamic, options={"post_grad_custom_pre_pass": chosen})


def windows(x: Tensor, heads: tuple[int, ...] = (2, 2, 4), dim: int = 64) -> list[Tensor]:
    pieces = torch.split(x, [h * dim for h in heads], dim=-1)
    return [p.unflatten(-1, (-1, dim)) for p in pieces]


def copies(pieces: list[Tensor]) -> list[Tensor]:
    return [aten.clone.default(p, memory_format=torch.contiguous_format) for p in pieces]


def projected(x: Tensor, weight: Tensor) -> list[Tensor]:
    mixed = aten.mm.default(x.flatten(0, 1), weight)
    return copies(windows(mixed.view(x.shape[0], x.shape[1], 512)))


def convolved(x: Tensor, weight: Tensor) -> list[Tensor]:
    mixed = aten.convolution.default(x, weight, None, [1], [3], [1], False, [0], 512)
    return copies(windows(mixed[..., : x.shape[2]].mT))


def heads_first(x: Tensor) -> list[Tensor]:
    return copies([p.transpose(1, 2) for p in windows(x)])


def many(x: Tensor) -> list[Tensor]:
    return copies(windows(x, (1,) * 8))


@pytest.mark.parametrize("dynamic", [(), (0,)])
def test_one_launch_instead_of_three(dynamic: tuple[int, ...]) -> None:
    args = torch.randn(2, 96, 64).bfloat16(), torch.randn(64, 512).bfloat16()
    assert len(launches(code_of(projected, *args, dynamic=dynamic, fused=False), STOCK)) == 3
    code = code_of(projected, *args, dynamic=dynamic)
    assert len(launches(code, KERNEL)) == 1 and launches(code, STOCK) == []
    assert "torch.ops.fusion_passes" not in code
    # The product, and three results.
    assert len(allocated(code)) == 4
    (launch,) = launches(code, KERNEL)
    assert "reinterpret_tensor" not in launch
    assert bool(re.search(r"\bs\d+\b", launch)) == bool(dynamic)


def test_the_convolution_is_read_through_its_strides() -> None:
    args = torch.randn(1, 512, 96).bfloat16(), torch.randn(512, 1, 4).bfloat16()
    code = code_of(convolved, *args)
    assert len(launches(code, KERNEL)) == 1 and launches(code, STOCK) == []
    definition = code[code.index(KERNEL) :]
    # 99 columns in memory for 96 tokens.
    assert "'X_D': 99" in definition and "'TOKENS': 96" in definition and "'TRANSPOSED': True" in definition


@pytest.mark.parametrize("function, count", [(heads_first, 1), (many, 2)])
def test_other_forms(function: Callable[..., Any], count: int) -> None:
    code = code_of(function, torch.randn(2, 96, 512).bfloat16())
    assert len(launches(code, KERNEL)) == count and launches(code, STOCK) == []


def test_symbolic_tokens_across_memory() -> None:
    """One binary for every prompt: pitch and tokens are arguments of the kernel."""
    code = code_of(lambda x: copies(windows(x.t())), torch.randn(512, 96).bfloat16(), dynamic=(0,))
    (launch,) = launches(code, KERNEL)
    assert len(re.findall(r"\bs\d+\b", launch)) >= 2
    definition = code[code.index(KERNEL) :]
    assert "'TOKENS': -1" in definition and "'X_D': -1" in definition and "'TRANSPOSED': True" in definition


def test_only_the_results_count_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written = fake_cuda.written_arguments(monkeypatch)
    code_of(heads_first, torch.randn(2, 96, 512).bfloat16())
    assert written == [["out0_ptr", "out1_ptr", "out2_ptr"]]
