"""`fusion_passes.testing.assert_op`: passes right ops, and names what is wrong with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_passes import eager
from fusion_passes.plans import Output, Program
from fusion_passes.testing import assert_op, poisoned
from tests.support import programs

LIBRARY = torch.library.Library("fusion_passes_test_assert_op", "FRAGMENT")


def declared(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    LIBRARY.define(f"{name}(Tensor x) -> Tensor")
    LIBRARY.impl(name, function, "CPU")
    torch.library.register_fake(f"fusion_passes_test_assert_op::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fusion_passes_test_assert_op, name).default


def all_but_the_last(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:-1] = x[:-1] * 2
    return out


RIGHT = declared("right", lambda x: x * 2, torch.empty_like)
COUNTS = declared("counts", lambda x: (x > 0).sum(0), lambda x: x.new_empty(x.shape[1:], dtype=torch.int64))
COARSE = declared("coarse", lambda x: (x * 2).half().to(x.dtype), torch.empty_like)
HOLES = declared("holes", all_but_the_last, torch.empty_like)
LYING = declared("lying", lambda x: x * 2, lambda x: x.new_empty(3))
X = torch.linspace(-1.1, 1, 12).view(4, 3)


@pytest.mark.parametrize("x", [X, X.bfloat16(), X[:0], X.new_tensor([[0.0, torch.inf], [-torch.inf, torch.nan]])])
def test_right_ops_pass(x: Tensor) -> None:
    assert_op(RIGHT, x)
    assert_op(RIGHT, x, exact=lambda x: x + x, bound=0.0)
    assert_op(COUNTS, x)


@pytest.mark.parametrize(
    "op, exact, words",
    [
        (COARSE, lambda x: x * 2, r"result 0 of .*coarse.* is off by .*e-04 \(relative L2\), allowed are 1\.0e-06"),
        (RIGHT, lambda x: x * 3, "is off by 3.3e-01"),
        (RIGHT, lambda x: x * 2 / (x > -1), "has other infinities|NaN at other places"),
        (RIGHT, lambda x: (x * 2)[:2], r"has shape \[4, 3\], expected \[2, 3\]"),
        (RIGHT, lambda x: (x * 2, x), "gives 1 results, expected 2"),
        (HOLES, lambda x: x * 2, "is NaN at other places than expected"),
        (COUNTS, lambda x: (x > 0.5).sum(0), "differs"),
    ],
)
def test_wrong_results_are_named(op: torch._ops.OpOverload, exact: Callable[..., Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        assert_op(op, X, exact=exact)


def test_a_wrong_registration_is_named() -> None:
    with pytest.raises(Exception, match="(?i)opcheck"):
        assert_op(LYING, X)


def test_memory_is_poisoned_inside_the_block_alone() -> None:
    mode = torch.get_deterministic_debug_mode()
    with poisoned():
        assert torch.empty(64).isnan().all() and bool((torch.empty(8, dtype=torch.int32) == 2**31 - 1).all())
    assert torch.get_deterministic_debug_mode() == mode


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_kernels_are_to_write_starts_poisoned(dtype: torch.dtype) -> None:
    """In these tests: that of eager calls on a GPU, and that of plans which are run on the interpreter or a GPU."""
    output = Output((2, 3), (1, 2), dtype)
    memory = eager._empty(output, torch.device("cpu"))
    (found,) = programs.run(lambda target, x: Program((), (output,)), (X,))
    for values in (memory, found):
        wide = values.double()
        assert values.stride() == (1, 2) and bool((wide.isnan() | (wide == 2.0**63)).all()), values
