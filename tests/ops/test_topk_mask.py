"""`torch.ops.fusion_passes.topk_mask` on CPU: the reference, the schema, what is refused, the launch choice."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fusion_passes import arch, benchmarking, tuning
from fusion_passes.lowering import NotInlinable, Target
from fusion_passes.ops.topk_mask import (
    LONGEST,
    OP,
    TABLE,
    block_of,
    cases,
    outer_axes,
    parameters_for,
    plan,
    reference,
    topk_mask,
)
from fusion_passes.plans import operand_of
from fusion_passes.testing import assert_op
from tests.support.topk_mask import DTYPES, REGIMES, drawn, expected, same


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("regime", REGIMES)
def test_values(regime: str, largest: bool, dtype: torch.dtype) -> None:
    scores = REGIMES[regime](drawn(7, 50, dtype=dtype))
    for k in (1, 2, 20, 49, 50):
        same(OP(scores, k, largest), expected(scores, k, largest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("regime", REGIMES)
def test_the_values_are_those_of_topk(regime: str, largest: bool, dtype: torch.dtype) -> None:
    """Which of equal entries are selected is left open; their values are not."""
    scores = REGIMES[regime](drawn(7, 50, dtype=dtype))
    for k in (1, 20, 50):
        mask = OP(scores, k, largest)
        assert (mask.sum(-1) == k).all()
        selected = scores[mask].view(7, k).sort(-1, descending=largest).values
        torch.testing.assert_close(
            selected, scores.topk(k, largest=largest).values, rtol=0.0, atol=0.0, equal_nan=True
        )  # fmt: skip


def test_of_equal_entries_those_in_front_are_taken() -> None:
    zero = torch.tensor([0.0, -0.0, 1.0, 0.0, -0.0, -1.0])
    assert OP(zero, 3, True).tolist() == [True, True, True, False, False, False]
    assert OP(zero, 3, False).tolist() == [True, True, False, False, False, True]
    nan = torch.tensor([1.0, math.nan, math.inf, -math.nan, -math.inf])
    assert OP(nan, 2, True).tolist() == [False, True, False, True, False]
    assert OP(nan, 4, False).tolist() == [True, True, True, False, True]


@pytest.mark.parametrize(
    "args",
    [
        (drawn(3, 4, 20), 5, True),
        (drawn(20, dtype=torch.bfloat16), 20, False),
        (drawn(4, 30)[:, 5:25], 7, True),
        (drawn(0, 20), 3, True),
    ],
    ids=["contiguous", "one_row", "strided", "empty"],
)
def test_opcheck(args: tuple[Any, ...]) -> None:
    assert_op(OP, *args, exact=reference)


def test_public_function() -> None:
    scores = drawn(3, 4, 20)
    same(topk_mask(scores, 5), expected(scores, 5, True))
    # What the kernel does not read is copied: columns that lie apart, and rows at three strides.
    same(topk_mask(scores.mT, 2, largest=False), expected(scores.mT, 2, False))
    apart = drawn(4, 5, 6, 7).transpose(0, 1)[:, :, :3]
    assert len(outer_axes(apart.shape, apart.stride())) == 3
    same(topk_mask(apart, 2), expected(apart, 2, True))
    with pytest.raises(ValueError, match="scores must be .*got a tensor without axes"):
        topk_mask(torch.tensor(1.0), 1)


@pytest.mark.parametrize(
    "args, error, words",
    [
        ((torch.zeros(2, 8).double(), 1, True), TypeError, "scores must be bfloat16, float16 or float32, got float64"),
        ((torch.zeros(2, 8).int(), 1, True), TypeError, "scores must be .*got int32"),
        ((torch.zeros(()), 1, True), ValueError, r"scores must be \[.., T\], got a tensor without axes"),
        ((torch.zeros(1, LONGEST + 1), 1, True), ValueError, "rows of at most 32768 entries, got 32769"),
        ((torch.zeros(2, 8), 0, True), ValueError, "k must be from 1 to the 8 entries of a row, got 0"),
        ((torch.zeros(2, 8), 9, True), ValueError, "k must be from 1 to the 8 entries of a row, got 9"),
        ((torch.zeros(2, 0), 1, True), ValueError, "k must be from 1 to the 0 entries of a row, got 1"),
        ((torch.zeros(8, 2).t(), 1, True), ValueError, r"a last stride of 1, got strides \[1, 2\]: copy them first"),
        ((torch.zeros(3, 4, 5, 6)[:, :2, :3], 1, True), ValueError, "rows at two strides at most.*copy them first"),
    ],
)
def test_bad_arguments(args: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        OP(*args)


def test_a_selection_has_no_gradient() -> None:
    scores = drawn(3, 20).requires_grad_()
    mask = OP(scores, 4, True)
    assert not mask.requires_grad
    (scores * mask).sum().backward()
    assert scores.grad is not None and torch.equal(scores.grad, mask.float())


# --- launch ----------------------------------------------------------------------------------------------------------


def launch(scores: torch.Tensor, k: int = 3, arch_name: str = "sm_90", inlined: bool = False) -> Any:
    return plan(Target(arch.by_name(arch_name), int, inlined), operand_of(scores), k, True)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_blocks_are_powers_of_two() -> None:
    assert [block_of(n) for n in (1, 2, 3, 1024, 1025, LONGEST)] == [1, 2, 4, 1024, 2048, LONGEST]


def test_rows_that_lie_at_one_stride_are_one_axis() -> None:
    for scores, axes in (
        (meta(40), []),
        (meta(1, 40), []),
        (meta(3, 4, 40), [(12, 40)]),
        (meta(3, 1, 4, 40), [(12, 40)]),
        (meta(3, 8, 40)[:, ::2], [(12, 80)]),
        (meta(3, 5, 40)[:, :4], [(3, 200), (4, 40)]),
        (meta(3, 1, 40).expand(3, 4, 40), [(3, 40), (4, 0)]),
        (meta(2, 3, 5, 40)[:, :, :4], [(6, 200), (4, 40)]),
        (meta(3, 4, 5, 40)[:, :2, :3], [(3, 800), (2, 200), (3, 40)]),
    ):
        assert outer_axes(scores.shape, scores.stride()) == axes
        if len(axes) < 3:
            assert launch(scores).grid == (math.prod(scores.shape[:-1]),)
            assert (launch(scores).args["ROWS"] == 0) == (len(axes) < 2)
        else:
            with pytest.raises(NotInlinable, match="rows lie at 3 strides"):
                launch(scores)


def test_another_number_of_rows_takes_the_same_kernel() -> None:
    """In eager calls, and within a power of two also another length and another k."""

    def constants(scores: torch.Tensor, k: int) -> dict[str, Any]:
        found = launch(scores, k)
        names = {parameter.name for parameter in found.kernel.params if parameter.is_constexpr}
        return {name: value for name, value in found.args.items() if name in names or value is None}

    assert constants(meta(7, 600), 3) == constants(meta(3, 5, 1024), 4) != constants(meta(7, 500), 3)
    assert constants(meta(3, 9, 600)[:, 2:], 3) == constants(meta(2, 8, 700)[:, 1:], 5)


def test_known_numbers_are_compiled_in() -> None:
    args = launch(meta(3, 9, 600)[:, 2:], 5, inlined=True).args
    assert [args[name] for name in ("LENGTH", "K", "ROWS", "X_B", "X_R")] == [600, 5, 7, 5400, 600]
    assert [args[name] for name in ("length", "k", "row_count", "x_stride_b", "x_stride_r")] == [None] * 5


@pytest.mark.parametrize("name", sorted(arch.TABLE))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tuned_entry_fits(name: str, dtype: torch.dtype) -> None:
    target = arch.by_name(name)
    for length in (1, 2, 31, 64, 1000, 1024, 2048, 5000, 8192, 16384, LONGEST):
        use = parameters_for(target, dtype, length)
        threads = use["warps"] * target.warp_size
        assert threads <= max(target.warp_size, block_of(length)) and block_of(length) <= 64 * threads
    assert set(TABLE.entries["default"]) == {"float32", "half"}


@pytest.mark.parametrize(
    "forced, words",
    [
        ("warps=64", "64 warps are 2048 threads, and a block of sm_90 has 1024"),
        ("warps=8", "a thread would hold 128 entries, and 64 fit in its registers"),
        ("warps=3", "must be a power of two"),
    ],
)
def test_forced_parameters_that_cannot_run(forced: str, words: str) -> None:
    with tuning.overriding(topk_mask=forced), pytest.raises(ValueError, match=words):
        parameters_for(arch.by_name("sm_90"), torch.float32, LONGEST)


def test_cases_say_what_they_move_and_leave_nothing_open() -> None:
    found = cases()
    assert len({case.name for case in found}) == len(found) == 9
    for case in found:
        if case.bytes > 1 << 20 and "bfloat16" not in case.name:
            continue
        scores, k, largest = args = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))
        assert case.bytes == scores.numel() * (scores.dtype.itemsize + 1)
        assert torch.equal(case.plain(*args), case.op(*args))
        assert torch.equal(case.op(*args), benchmarking.exact_result(case, args))
        ranked = scores.float().sort(-1, descending=True).values
        assert (ranked[..., k - 1] > ranked[..., k]).all() and largest
