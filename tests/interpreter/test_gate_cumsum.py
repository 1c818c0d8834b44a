"""`gate_cumsum_kernel` against a float64 loop, on the interpreter; outputs start as NaN, so each must be written."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from fusion_passes import tuning
from tests.support.gate_cumsum import expected, launch, per_token
from tests.support.programs import target_for

SERIAL, TILE = "rows=8,serial=1", "rows=16,lanes=16,serial=0"


def operands(
    batch: int, tokens: int, groups: int, per_group: int, channels: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(tokens * 7 + channels)
    raw = torch.randn(batch, tokens, groups, per_group, channels, generator=g) * 6
    a_log = torch.rand(groups, per_group, channels, generator=g).mul(16).log()
    return raw.to(dtype), a_log, torch.randn(groups, per_group, channels, generator=g)


def check(
    raw: torch.Tensor, a_log: torch.Tensor, bias: torch.Tensor | None, *, layout: str = "bnchk", chunk: int = 16,
    extra_chunks: int = 0, pad_gate: bool = False, launch_with: str = SERIAL, **form: Any,
) -> None:  # fmt: skip
    tokens = raw.shape[1]
    chunks = -(-tokens // chunk) + extra_chunks
    full = {"lower_bound": None, "scale": 1.0, "beta": 1.0, "threshold": 20.0, **form}
    args = (raw, a_log, bias, chunks, chunk, *full.values(), pad_gate, layout, None, None)
    with tuning.overriding(gate_cumsum=launch_with):
        out = per_token(launch(args), layout, tokens)
    # The tail: no gate, or the gate of raw = 0.
    padded = torch.cat([raw, raw.new_zeros(raw.shape[0], chunks * chunk - tokens, *raw.shape[2:])], dim=1)
    want = expected(padded, a_log, bias, chunk, range(0, chunks * chunk + 1, chunk), **full)
    if not pad_gate:
        for t in range(tokens, chunks * chunk):
            want[:, t] = 0.0 if t % chunk == 0 else want[:, t - 1]
    torch.testing.assert_close(out.double(), want, rtol=4e-6, atol=1e-9, equal_nan=True)  # terms of both signs cancel


@pytest.mark.parametrize("launch_with", [SERIAL, TILE])
@pytest.mark.parametrize("layout", ["".join(p) for p in itertools.permutations("bnchk")][::13])
def test_layouts(layout: str, launch_with: str) -> None:
    check(*operands(2, 37, 1, 2, 24), layout=layout, launch_with=launch_with)


@pytest.mark.parametrize("launch_with", [SERIAL, TILE])
@pytest.mark.parametrize("channels", [1, 64, 96, 128, 256])
def test_channels(channels: int, launch_with: str) -> None:
    check(
        *operands(1, 19, 1, 3 if channels < 128 else 1, channels),
        launch_with=launch_with if channels > 1 else launch_with + ",lanes=2",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_dtypes_and_forms(dtype: torch.dtype, lower_bound: float | None) -> None:
    raw, a_log, bias = operands(1, 20, 1, 2, 32, dtype)
    check(raw, a_log.to(dtype), bias.to(dtype), lower_bound=lower_bound, scale=1 / math.log(2))


@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129])
def test_chunks_and_tails(chunk: int, tokens: int) -> None:
    check(*operands(1, tokens, 1, 1, 16), chunk=chunk, extra_chunks=1, launch_with="rows=16,lanes=16,serial=0")
    check(*operands(1, tokens, 1, 1, 16), chunk=chunk, pad_gate=True)


@pytest.mark.parametrize("beta, threshold", [(1.0, 20.0), (2.0, 20.0), (0.5, 3.0), (1.0, -1.0), (1.0, math.inf)])
def test_softplus_parameters(beta: float, threshold: float) -> None:
    check(*operands(1, 18, 1, 2, 16), beta=beta, threshold=threshold)


def test_without_bias_and_with_zero_strides() -> None:
    raw, a_log, bias = operands(2, 20, 1, 4, 32)
    check(raw, a_log[..., :1].expand(1, 4, 32), None)
    check(raw, a_log[:, :1, :1].expand(1, 4, 32), bias[:, :1].expand(1, 4, 32))


@pytest.mark.parametrize("channels", [1, 32])
def test_strided_views(channels: int) -> None:
    raw, a_log, bias = operands(2, 21, 2, 3, channels)
    wide = torch.full((2, 21, 2, 5, channels + 4), math.nan, dtype=raw.dtype)
    wide[:, :, :, 1:4, 2 : channels + 2] = raw
    forced = SERIAL if channels > 1 else SERIAL + ",lanes=4"
    check(wide[:, :, :, 1:4, 2 : channels + 2], a_log, bias, launch_with=forced)
    time_last = raw.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    check(time_last, a_log, bias, layout="bhnck", launch_with=forced)
    check(raw.transpose(0, 1).contiguous().transpose(0, 1), a_log, bias, launch_with=forced)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gate_is_accurate_to_a_millionth(lower_bound: float | None) -> None:
    z = torch.linspace(-20, 30, 128 * 64)
    raw, zero = z.view(1, 64, 1, 1, 128), torch.zeros(1, 1, 128)
    args = (raw, zero, None, 4, 16, lower_bound, 1.0, 1.0, 20.0, False, "bnchk", None, None)
    with tuning.overriding(gate_cumsum="rows=1,lanes=128,serial=1"):
        out = launch(args)[:, :, 0].double()
    exact = expected(raw, zero, None, 1, range(65), lower_bound=lower_bound)[:, ::16]
    assert ((out - exact) / exact).abs().max() < 1.2e-6


def test_infinite_and_nan_inputs() -> None:
    special = torch.tensor([-math.inf, math.inf, math.nan, 1e4, -1e4, 88.0, -88.0, 0.0])
    raw = torch.zeros(1, 16, 1, 1, 8)
    raw[0, 3] = special
    check(raw, torch.zeros(1, 1, 8), None, launch_with="rows=4,lanes=8,serial=1")
    check(raw, torch.zeros(1, 1, 8), None, lower_bound=-5.0, launch_with="rows=16,lanes=8,serial=0")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_indices", [False, True])
@pytest.mark.parametrize("lengths", [[40], [1, 1, 30], [0, 17, 0, 0, 16, 33, 0], [16, 16], [1] * 6])
def test_packed_sequences(lengths: list[int], with_indices: bool, dtype: torch.dtype) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    raw, a_log, bias = operands(1, bounds[-1], 1, 2, 32)
    chunks = [(s, c) for s, n in enumerate(lengths) for c in range(-(-n // 16))]
    indices = torch.tensor(chunks[::-1], dtype=dtype) if with_indices else None
    for layout, forced in (("bnchk", SERIAL), ("bnhck", TILE)):
        args = (
            raw,
            a_log,
            bias,
            1,
            16,
            None,
            1.0,
            1.0,
            20.0,
            False,
            layout,
            torch.tensor(bounds, dtype=dtype),
            indices,
        )
        with tuning.overriding(gate_cumsum=forced):
            out = per_token(launch(args), layout, bounds[-1])
        torch.testing.assert_close(out.double(), expected(raw, a_log, bias, 16, bounds), rtol=2e-6, atol=1e-9)


def test_more_sequences_than_one_search_step() -> None:
    lengths = [1, 0] * 65
    bounds = [0, *itertools.accumulate(lengths)]
    raw, a_log, bias = operands(1, bounds[-1], 1, 1, 16)
    args = (raw, a_log, bias, 1, 16, None, 1.0, 1.0, 20.0, False, "bnchk", torch.tensor(bounds), None)
    out = per_token(launch(args), "bnchk", bounds[-1])
    torch.testing.assert_close(out.double(), expected(raw, a_log, bias, 16, bounds), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(
    "bounds", [[-(2**40), 2**40], [0, 500], [30, 0], [0, 40, 20, 90, -7], [2**62, -(2**62), 2**62]]
)
@pytest.mark.parametrize("with_indices", [False, True])
def test_bounds_out_of_range_touch_no_other_memory(bounds: list[int], with_indices: bool) -> None:
    tokens = 40
    raw, a_log, bias = operands(1, tokens, 1, 1, 16)
    guarded = torch.full((3 * tokens, 16), 7.0)
    indices = torch.tensor([[-5, 0], [10**9, 1], [0, -(10**9)], [0, 2**62], [1, 1]]) if with_indices else None
    args = (raw, a_log, bias, 1, 16, None, 1.0, 1.0, 20.0, False, "bnchk", torch.tensor(bounds), indices)
    from fusion_passes.lowering import Operand, Output
    from fusion_passes.ops.gate_cumsum import plan
    from fusion_passes.plans import operand_of

    chosen = plan(target_for(raw.device), *map(operand_of, args))
    values = {n: v.handle if isinstance(v, Operand) else v for n, v in chosen.args.items()}
    name = next(n for n, v in chosen.args.items() if isinstance(v, Output))
    values[name] = guarded[tokens : 2 * tokens]
    chosen.kernel[chosen.grid](**values)
    assert bool((guarded[:tokens] == 7).all()) and bool((guarded[2 * tokens :] == 7).all())
    assert not guarded.isnan().any()
