"""`torch.ops.fusion_passes.gate_cumsum` on CPU: the reference, the schema, what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusion_passes import arch, tuning
from fusion_passes.ops.gate_cumsum import OP, cases, gate_cumsum, parameters_for, reference
from fusion_passes.testing import assert_op
from tests.support.gate_cumsum import expected, per_token

SIZES = {"batch": 2, "tokens": 37, "groups": 2, "per_group": 3, "channels": 8}


def arguments(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> tuple[Any, ...]:
    """Valid arguments of the op in order, some of them replaced by name."""
    g = torch.Generator().manual_seed(0)
    size = {**SIZES, **{k: changes.pop(k) for k in list(changes) if k in SIZES}}
    heads = (size["groups"], size["per_group"], size["channels"])
    raw = torch.randn(size["batch"], size["tokens"], *heads, generator=g).mul(5).to(dtype)
    values = {
        "raw": raw, "a_log": torch.rand(heads, generator=g).mul(16).log(), "bias": torch.randn(heads, generator=g),
        "chunks": -(-size["tokens"] // 16), "chunk_size": 16, "lower_bound": None, "scale": 1.0, "beta": 1.0,
        "threshold": 20.0, "pad_gate": False, "layout": "bnchk", "cu_seqlens": None, "chunk_indices": None,
    }  # fmt: skip
    assert set(changes) <= set(values)
    return tuple({**values, **changes}.values())


def packed(lengths: list[int], **changes: Any) -> tuple[Any, ...]:
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    return arguments(**{"batch": 1, "tokens": sum(lengths), "chunks": 1, "cu_seqlens": bounds, **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("layout", ["bnchk", "bhnck", "kchnb"])
def test_values(dtype: torch.dtype, lower_bound: float | None, layout: str) -> None:
    args = arguments(dtype, lower_bound=lower_bound, layout=layout, scale=1.5)
    out = OP(*args)
    assert out.dtype == torch.float32 and out.is_contiguous()
    exact = expected(args[0], args[1], args[2], 16, [0, 16, 32, 37], lower_bound=lower_bound, scale=1.5)
    torch.testing.assert_close(per_token(out, layout, 37)[:, :37].double(), exact, rtol=2e-6, atol=1e-8)


def test_tail_repeats_the_sum_or_gates_zeros() -> None:
    out = per_token(OP(*arguments(chunks=4)), "bnchk", 64)
    assert torch.equal(out[:, 37:48], out[:, 36:37].expand_as(out[:, 37:48]))
    assert not out[:, 48:].any()
    args = arguments(pad_gate=True)
    zeros = torch.cat([args[0], args[0].new_zeros(2, 11, 2, 3, 8)], dim=1)
    exact = expected(zeros, args[1], args[2], 16, [0, 16, 32, 48])
    torch.testing.assert_close(per_token(OP(*args), "bnchk", 48).double(), exact, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("lengths", [[37], [0, 5, 0, 16, 33, 0], [1], [1, 1, 1]])
def test_packed_sequences(lengths: list[int]) -> None:
    args = packed(lengths, lower_bound=-5.0)
    out = OP(*args)
    assert out.shape == (1, 1, sum(lengths), 6, 8)
    exact = expected(args[0], args[1], args[2], 16, args[11].tolist(), lower_bound=-5.0)
    torch.testing.assert_close(per_token(out, "bnchk", sum(lengths)).double(), exact, rtol=2e-6, atol=1e-8)


def test_reference_computes_in_float64_on_float64() -> None:
    args: list[Any] = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments()]
    out = reference(*args)
    assert out.dtype == torch.float64
    exact = expected(args[0], args[1], args[2], 16, [0, 16, 32, 37])
    torch.testing.assert_close(per_token(out, "bnchk", 37)[:, :37], exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "args",
    [arguments(), arguments(layout="bhnck", bias=None, lower_bound=-5.0), packed([5, 32]), packed([0])],
    ids=["dense", "bounded", "packed", "empty"],
)
def test_opcheck(args: tuple[Any, ...]) -> None:
    assert_op(OP, *args, exact=reference)


def test_empty_inputs() -> None:
    assert OP(*arguments(tokens=0, chunks=0)).shape == (2, 0, 16, 6, 8)
    assert OP(*packed([0, 0])).shape == (1, 1, 0, 6, 8)
    assert OP(*packed([])).shape == (1, 1, 0, 6, 8)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"raw": torch.zeros(2, 3, 4)}, ValueError, r"raw must be \[B, T, G, R, K\].*\[2, 3, 4\]"),
        ({"raw": torch.zeros(1, 16, 2, 3, 8, dtype=torch.int32)}, TypeError, "raw must be bfloat16.*int32"),
        ({"a_log": torch.zeros(2, 3)}, ValueError, r"a_log must be \[G, R, K\] = \[2, 3, 8\].*\[2, 3\]"),
        ({"bias": torch.zeros(2, 3, 7)}, ValueError, r"bias must be .*\[2, 3, 7\]"),
        ({"a_log": torch.zeros(2, 3, 8, device="meta")}, ValueError, "a_log must be on the device of raw.*meta"),
        ({"chunk_size": 48}, ValueError, "chunk_size must be one of 16, 32, 64, 128, got 48"),
        ({"bias": torch.zeros(2, 3, 8).double()}, TypeError, "bias must be bfloat16.*float64"),
        ({"chunks": 2}, ValueError, r"chunks \* chunk_size >= T, got 2 \* 16 < 37"),
        ({"layout": "bnck"}, ValueError, "layout must order the letters.*'bnck'"),
        ({"beta": 0.0}, ValueError, "beta must be positive and finite, got 0.0"),
        ({"threshold": math.nan}, ValueError, "threshold must be a number"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        ({"lower_bound": -math.inf}, ValueError, "lower_bound must be finite"),
        ({"chunk_indices": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, "chunk_indices needs cu_seqlens"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        OP(*arguments(**changes))


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"cu_seqlens": torch.tensor([0.0, 37.0])}, TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, 37]])}, ValueError, r"cu_seqlens must be \[S \+ 1\].*\[1, 2\]"),
        ({"cu_seqlens": torch.tensor([1, 37])}, ValueError, "must start at 0 and end at T = 37, got 1 and 37"),
        ({"cu_seqlens": torch.tensor([0, 36])}, ValueError, "must start at 0 and end at T = 37, got 0 and 36"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 37])}, ValueError, "must not decrease, got 9, 5 at positions 1 and 2"),
        ({"cu_seqlens": torch.tensor([37])}, ValueError, "holds one bound"),
        ({"cu_seqlens": torch.tensor([0, 7, 37, 7])[::2]}, ValueError, "cu_seqlens must be contiguous"),
        ({"cu_seqlens": torch.tensor([0, 37], device="meta")}, ValueError, "cu_seqlens must be on the device of raw"),
        ({"chunk_indices": torch.zeros(3, 2)}, TypeError, "chunk_indices must be int32 or int64, got torch.float32"),
        ({"chunks": 3}, ValueError, "chunks must be 1 with cu_seqlens.*got 3"),
        ({"batch": 2}, ValueError, "raw must have B = 1 with cu_seqlens"),
        ({"chunk_indices": torch.zeros(3, dtype=torch.int64)}, ValueError, r"chunk_indices must be \[NC, 2\]"),
        ({"chunk_indices": torch.zeros(9, 2, dtype=torch.int64)}, ValueError, "must have 3 to 4 rows.*got 9"),
        ({"chunk_indices": torch.tensor([[0, 0], [0, 1], [0, 3]])}, ValueError, r"each of the 3 chunks.*got \[0, 3\]"),
    ],
)
def test_bad_packing(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        OP(*packed([37], **changes))


def test_fake_tensors_of_cuda_need_no_values() -> None:
    with FakeTensorMode():
        args = [torch.empty_like(a, device="cuda") if isinstance(a, torch.Tensor) else a for a in packed([5, 32])]
        assert OP(*args).shape == (1, 1, 37, 6, 8)


def test_backward_says_that_there_is_none() -> None:
    args = arguments(torch.float32)
    args[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="gate_cumsum has no gradient"):
        OP(*args).sum().backward()


@pytest.mark.parametrize("head_first", [False, True])
def test_public_function(head_first: bool) -> None:
    raw, a_log, bias = torch.randn(2, 70, 3, 8), torch.randn(3), torch.randn(3, 8)
    out = gate_cumsum(raw, a_log, bias, scale=2.0, head_first=head_first)
    wide = a_log[:, None].expand(3, 8)
    exact = expected(raw.unsqueeze(2), wide[None], bias[None], 64, [0, 64, 70], scale=2.0)
    exact = exact.transpose(1, 2) if head_first else exact
    torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=1e-8)
    scalar = gate_cumsum(raw[..., 0], a_log, torch.tensor(0.5), head_first=head_first)
    assert scalar.shape == ((2, 3, 70) if head_first else (2, 70, 3))
    wanted = gate_cumsum(raw[..., :1], a_log[:, None], torch.full((3, 1), 0.5), head_first=head_first)
    assert torch.equal(scalar, wanted.squeeze(-1))
    sequences = gate_cumsum(raw[:1], a_log, cu_seqlens=torch.tensor([0, 3, 70]), head_first=head_first)
    first = sequences.transpose(1, 2)[:, :3] if head_first else sequences[:, :3]
    torch.testing.assert_close(first, gate_cumsum(raw[:1, :3], a_log))


@pytest.mark.parametrize("length", [0, 1])
def test_public_function_on_short_inputs(length: int) -> None:
    assert gate_cumsum(torch.randn(1, length, 3, 8), torch.randn(3)).shape == (1, length, 3, 8)


def test_public_function_refuses() -> None:
    with pytest.raises(ValueError, match=r"raw must be \[B, T, H, K\] or \[B, T, H\]"):
        gate_cumsum(torch.randn(3, 4), torch.randn(3))
    with pytest.raises(ValueError, match=r"a_log must be \[3\], \[3, 8\].*\[5\]"):
        gate_cumsum(torch.randn(1, 4, 3, 8), torch.randn(5))
    with pytest.raises(ValueError, match="chunk_size must be one of"):
        gate_cumsum(torch.randn(1, 4, 3, 8), torch.randn(3), chunk_size=0)


def test_forced_launch_parameters_that_cannot_run() -> None:
    def choose(forced: str, on: str = "sm_90", heads: int = 32, channels: int = 128) -> dict[str, int]:
        with tuning.overriding(gate_cumsum=forced):
            return parameters_for(arch.by_name(on), "bnchk", 1 << 20, 64, heads, channels)

    assert choose("rows=8,lanes=64,warps=2") == {"rows": 8, "lanes": 64, "warps": 2, "serial": 1}
    with pytest.raises(ValueError, match="64 warps are 2048 threads, and a block of sm_90 has 1024"):
        choose("warps=64")
    with pytest.raises(ValueError, match="32 warps are 2048 threads, and a block of gfx942 has 1024"):
        choose("warps=32", "gfx942")
    with pytest.raises(ValueError, match="rows=128 is more than a chunk of 64"):
        choose("rows=128")
    with pytest.raises(ValueError, match=r"lanes=256 is more than there are channels \(128\)"):
        choose("lanes=256")
    with pytest.raises(ValueError, match="a thread would hold 256 values"):
        choose("rows=64,lanes=128,warps=1,serial=0")
    with pytest.raises(ValueError, match="131072 bytes, and a block of gfx942 has 65536"):
        choose("rows=64,lanes=512,warps=16,serial=0", "gfx942", 512, 1)


@pytest.mark.parametrize("name", sorted(arch.TABLE))
@pytest.mark.parametrize("heads, channels", [(1, 1), (3, 1), (32, 1), (32, 128), (2, 96), (1, 100), (5, 7)])
def test_tuned_parameters_fit_every_shape(name: str, heads: int, channels: int) -> None:
    for chunk_size, elements, layout in itertools.product((16, 128), (1, 1 << 23, 1 << 33), ("bnchk", "bhnck")):
        use = parameters_for(arch.by_name(name), layout, elements, chunk_size, heads, channels)
        assert use["rows"] <= chunk_size and use["lanes"] < 2 * max(heads if channels == 1 else channels, 1)


def test_benchmark_cases_are_consistent() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in cases():
        if case.bytes <= 6 << 20:
            args = case.make(torch.device("cpu"), generator)
            out = case.op(*args)
            # raw is read once and the sums are written once; a_log and bias are small beside them.
            assert case.bytes == args[0].numel() * args[0].element_size() + out.numel() * out.element_size()
            assert case.floor_us(arch.by_name("sm_90")) == pytest.approx(case.bytes / 4.25e6)
