"""`torch.ops.fusion_passes.qkv_split` on CPU: the reference, the schema, what is refused, the launch choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusion_passes import arch, tuning
from fusion_passes.lowering import Target
from fusion_passes.ops.qkv_split import OP, TABLE, cases, parameters_for, plan, qkv_split
from fusion_passes.plans import operand_of
from fusion_passes.testing import assert_op
from tests.support.qkv_split import expected, numbered, same_bits

ARGUMENTS: dict[str, Any] = {"heads": [2, 2, 4], "dims": [8, 8, 8], "repeats": [1, 1, 1], "head_major": False}


def arguments(x: torch.Tensor | None = None, **changes: Any) -> tuple[Any, ...]:
    """Valid arguments of the op in order, some of them replaced by name."""
    assert set(changes) <= set(ARGUMENTS)
    return (numbered(2, 5, 64) if x is None else x, *{**ARGUMENTS, **changes}.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("repeats", [[1, 1, 1], [2, 3, 1]])
@pytest.mark.parametrize("strided", [False, True])
def test_values(dtype: torch.dtype, head_major: bool, repeats: list[int], strided: bool) -> None:
    x = numbered(2, 64, 5, dtype=dtype).mT if strided else numbered(2, 5, 64, dtype=dtype)
    args = arguments(x, head_major=head_major, repeats=repeats)
    same_bits(OP(*args), expected(*args))


@pytest.mark.parametrize(
    "args",
    [
        arguments(),
        arguments(numbered(2, 64, 5).mT, head_major=True, repeats=[1, 2, 1]),
        arguments(numbered(1, 0, 64)),
        arguments(numbered(1, 1, 64), heads=[1, 2], dims=[16, 24], repeats=[1, 1]),
    ],
    ids=["rows", "strided", "empty", "widths"],
)
def test_opcheck(args: tuple[Any, ...]) -> None:
    assert_op(OP, *args, exact=expected, bound=0.0)


def test_results_are_never_the_input() -> None:
    x = numbered(1, 1, 64)
    outs = OP(*arguments(x))
    assert all(out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for out in outs)


def test_public_function() -> None:
    x = numbered(5, 64)
    q, k, v = qkv_split(x, [2, 2, 4], 8)
    assert q.shape == (5, 2, 8) and v.shape == (5, 4, 8) and torch.equal(k, x[:, 16:32].unflatten(-1, (2, 8)))
    q, k = qkv_split(x[None], [4, 2], [8, 16], repeats=[1, 3], head_first=True)
    assert q.shape == (1, 4, 5, 8) and torch.equal(k[0, 5], x[:, 48:])
    with pytest.raises(ValueError, match=r"x must be \[B, T, D\] or \[T, D\], got shape \[64\]"):
        qkv_split(x[0], [2, 2, 4], 8)


@pytest.mark.parametrize(
    "args, error, words",
    [
        (arguments(torch.zeros(2, 64)), ValueError, r"x must be \[B, T, D\], got shape \[2, 64\]"),
        (arguments(torch.zeros(1, 2, 64, dtype=torch.int16)), TypeError, "x must be bfloat16.*int16"),
        (arguments(heads=[2, 6]), ValueError, "one entry per window, got 2, 3 and 3"),
        (arguments(heads=[8], dims=[8], repeats=[1]), ValueError, r"heads must be of two windows or more, got \[8\]"),
        (arguments(dims=[8, 12, 8]), ValueError, r"dims must be positive multiples of 8, got \[8, 12, 8\]"),
        (arguments(heads=[2, 0, 4]), ValueError, r"heads must be positive, got \[2, 0, 4\]"),
        (arguments(repeats=[1, 1, 0]), ValueError, r"repeats must be positive, got \[1, 1, 0\]"),
        (arguments(heads=[2, 2, 3]), ValueError, "heads . dims must sum to the 64 columns of x, got 56"),
    ],
)
def test_bad_arguments(args: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        OP(*args)


def test_no_gradient() -> None:
    x = torch.zeros(1, 2, 64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="qkv_split has no gradient.*torch.split"):
        OP(*arguments(x))[0].sum().backward()


# --- launch ----------------------------------------------------------------------------------------------------------


def launches(x: torch.Tensor, heads: list[int], dim: int = 128, *, inlined: bool = False, **form: Any) -> Any:
    repeats = [1] * len(heads)
    return plan(Target(arch.by_name("sm_90"), int, inlined), operand_of(x), heads, [dim] * len(heads), repeats,
                form.get("head_major", False)).launches  # fmt: skip


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def test_one_launch_for_up_to_six_windows() -> None:
    for count, wanted in ((2, 1), (6, 1), (7, 2), (13, 3)):
        assert len(launches(empty(1, 64, 128 * count), [1] * count)) == wanted


@pytest.mark.parametrize("strided", [False, True])
def test_another_number_of_tokens_takes_the_same_kernel(strided: bool) -> None:
    """In eager calls: what is compiled in must not depend on T, within one entry of the table."""

    def constants(tokens: int) -> dict[str, Any]:
        x = empty(1, 2048, tokens).mT if strided else empty(1, tokens, 2048)
        (launch,) = launches(x, [4, 4, 8])
        names = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
        return {name: value for name, value in launch.args.items() if name in names or value is None}

    assert constants(1024) == constants(1032) == constants(2000)


def test_known_numbers_are_compiled_in() -> None:
    (launch,) = launches(empty(1, 2048, 64).mT, [4, 4, 8], inlined=True)
    assert [launch.args[name] for name in ("TOKENS", "X_B", "X_T", "X_D", "OFFSET")] == [64, 0, 1, 64, 0]
    assert launch.args["token_count"] is None and launch.args["x_stride_d"] is None


def test_batch_and_tokens_are_one_axis_where_memory_allows() -> None:
    (rows,) = launches(empty(128, 1, 512), [1, 1, 2])
    assert rows.args["token_count"] == 128 and rows.args["X_T"] == 512 and rows.args["X_B"] == 0
    (apart,) = launches(empty(4, 8, 512), [1, 1, 2], head_major=True)
    assert apart.args["token_count"] == 8 and apart.args["x_stride_b"] == 8 * 512


@pytest.mark.parametrize("name", sorted(arch.TABLE))
@pytest.mark.parametrize("shape_class", ["rows", "transposed", "unaligned"])
@pytest.mark.parametrize("widths", [[2048, 2048, 4096], [96, 96, 192], [8, 8], [6144, 128]])
def test_every_tuned_entry_fits(name: str, shape_class: str, widths: list[int]) -> None:
    for elements in (1, 1 << 20, 1 << 24, 1 << 32):
        for itemsize in (2, 4):
            use = parameters_for(arch.by_name(name), shape_class, elements, widths, itemsize)
            assert use["lanes"] >= 8
    assert set(TABLE.entries["default"]) == {"rows", "transposed", "unaligned"}


@pytest.mark.parametrize(
    "forced, words",
    [
        ("warps=64", "64 warps are 2048 threads"),
        ("lanes=4", "lanes=4 is less than the 8 columns"),
        ("rows=1024,lanes=256,warps=1", "bytes, and 512 fit in its registers"),
        ("rows=3", "must be a power of two"),
    ],
)
def test_forced_parameters_that_cannot_run(forced: str, words: str) -> None:
    with tuning.overriding(qkv_split=forced), pytest.raises(ValueError, match=words):
        parameters_for(arch.by_name("sm_90"), "transposed", 1 << 20, [2048, 2048], 2)


def test_cases_say_what_they_move() -> None:
    found = cases()
    assert len({case.name for case in found}) == len(found) >= 19
    with FakeTensorMode():
        for case in found:
            args = case.make(torch.device("cpu"), torch.Generator())
            outs = case.op(*args)
            assert case.bytes == 2 * (args[0].numel() + sum(out.numel() for out in outs))
            assert [o.shape for o in case.plain(*args)] == [o.shape for o in outs]
