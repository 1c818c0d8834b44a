"""The wrapper that Inductor generates around a selection: one launch, and the scatters in the kernel behind it."""

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

KERNEL, STOCK = "topk_mask_kernel", "triton_"
OPAQUE = "torch.ops.fusion_passes.topk_mask.default("
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _supported() -> None:
    fake_cuda.require()


def code_of(function: Callable[..., Any], *args: Tensor, dynamic: tuple[int, ...] = (), fused: bool = True) -> str:
    chosen = FusionPass(snapshot({"strict": True, "fusions": "topk_mask" if fused else "none"}))
    return fake_cuda.wrapper_code(function, args, dynamic=dynamic, options={"post_grad_custom_pre_pass": chosen})


def masked(x: Tensor) -> Tensor:
    """What is written to is computed, and so is what reads it."""
    base = aten.cos.default(x)
    return aten.exp.default(aten.scatter.value(base, -1, aten.topk.default(x, 64)[1], 0.0))


def computed(x: Tensor) -> Tensor:
    return masked(aten.mul.Tensor(aten.sin.default(x), 2.0))


def projected(x: Tensor, weight: Tensor) -> Tensor:
    return masked(aten.mm.default(x, weight))


@pytest.mark.parametrize("dynamic", [(), (0,)])
def test_one_launch_and_one_for_what_reads_the_mask(dynamic: tuple[int, ...]) -> None:
    x = torch.randn(2, 96, 2048)
    stock = code_of(masked, x, dynamic=dynamic, fused=False)
    assert "aten.topk.default(" in stock and len(launches(stock, STOCK)) >= 2
    code = code_of(masked, x, dynamic=dynamic)
    assert len(launches(code, KERNEL)) == len(launches(code, STOCK)) == 1
    assert OPAQUE not in code and "aten.topk.default(" not in code
    # The mask and the result.
    assert len(allocated(code)) == 2
    (launch,) = launches(code, KERNEL)
    assert "reinterpret_tensor" not in launch
    assert bool(re.search(r"\bs\d+\b", launch)) == bool(dynamic)
    definition = code[code.index(KERNEL) :]
    assert "'LENGTH': 2048" in definition and "'K': 64" in definition and "'BLOCK': 2048" in definition


@pytest.mark.parametrize("function", [computed, projected])
def test_scores_that_are_computed(function: Callable[..., Any]) -> None:
    args = (torch.randn(96, 2048),) if function is computed else (torch.randn(96, 64), torch.randn(64, 2048))
    code = code_of(function, *args)
    assert len(launches(code, KERNEL)) == 1 and OPAQUE not in code
    assert len(launches(code, STOCK)) == (2 if function is computed else 1)


def test_rows_at_two_strides() -> None:
    """A slice of the rows is read where it lies."""
    code = code_of(lambda x: masked(x[:, 8:]), torch.randn(3, 40, 1024))
    assert len(launches(code, KERNEL)) == 1 and len(launches(code, STOCK)) == 1
    definition = code[code.index(KERNEL) :]
    assert "'ROWS': 32" in definition and "'X_B': 40960" in definition and "'X_R': 1024" in definition


def test_symbolic_rows_at_two_strides() -> None:
    code = code_of(lambda x: masked(x[:, 8:]), torch.randn(3, 40, 1024), dynamic=(0,))
    (launch,) = launches(code, KERNEL)
    assert OPAQUE not in code and len(re.findall(r"\bs\d+\b", launch)) >= 2
    assert "'ROWS': -1" in code[code.index(KERNEL) :]


def test_only_the_mask_counts_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written = fake_cuda.written_arguments(monkeypatch)
    code_of(masked, torch.randn(96, 2048))
    assert written == [["out_ptr"]]
