"""The kernels of `chunk_delta_rule` against the recurrence in float64, on the interpreter; all memory starts as NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fusion_passes import tuning
from fusion_passes.ops._chunk_delta_rule_plan import plan
from fusion_passes.ops.chunk_delta_rule import log_decay
from tests.support.delta_rule import operands, recurrence
from tests.support.programs import run

Tensor = torch.Tensor

# bfloat16: one rounding of the operands of a product, of which four follow one another. float32: decays are
# exponentials of differences of sums up to a thousand.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 6e-3}
BOTH = pytest.mark.parametrize("per_channel", [False, True])


def error(actual: Tensor, exact: Tensor) -> float:
    assert bool(torch.isfinite(actual).all())
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def check(
    given: dict[str, Any], *, launch: str = "segments=1", state: Tensor | None = None, bounds: list[int] | None = None,
    norm_eps: float | None = 1e-6, gate: str = "log", a_log: Tensor | None = None, dt_bias: Tensor | None = None,
    beta_sigmoid: float | None = None,
) -> None:  # fmt: skip
    dtype, scale = given["q"].dtype, 0.3
    packed = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    form = (scale, norm_eps, gate, -5.0, beta_sigmoid, torch.float32, True)
    with tuning.overriding(chunk_delta_rule=launch):
        out, final = run(plan, (*given.values(), a_log, dt_bias, state, packed, *form))
    rate, bias = (t if t is None else t.double() for t in (a_log, dt_bias))
    decay = log_decay(given["g"].double(), rate, bias, gate, -5.0)
    strength = given["beta"].double() if beta_sigmoid is None else beta_sigmoid * given["beta"].double().sigmoid()
    exact = {**given, "g": decay, "beta": strength}
    wanted, states = recurrence(**exact, initial_state=state, bounds=bounds, scale=scale, norm_eps=norm_eps)
    tolerance = TOLERANCE[dtype]
    assert error(out, wanted) <= tolerance
    assert error(final, states) <= tolerance


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype, per_channel: bool) -> None:
    check(operands(1, 70, 1, 2, 16, 32, per_channel=per_channel, dtype=dtype))


@BOTH
@pytest.mark.parametrize("tokens", [1, 63, 64, 129])
def test_tails_and_an_initial_state(tokens: int, per_channel: bool) -> None:
    state = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    check(operands(2, tokens, 1, 1, 16, 16, per_channel=per_channel), state=state)


@BOTH
@pytest.mark.parametrize("key, value", [(64, 96), (96, 64)])
def test_widths_that_are_no_powers_of_two(key: int, value: int, per_channel: bool) -> None:
    check(operands(1, 20, 1, 1, key, value, per_channel=per_channel))


@BOTH
@pytest.mark.parametrize("segments", [2, 4])
def test_segments(segments: int, per_channel: bool) -> None:
    state = torch.randn(1, 1, 16, 32, generator=torch.Generator().manual_seed(1))
    given = operands(1, 330, 1, 1, 16, 32, per_channel=per_channel)
    check(given, launch=f"segments={segments},columns=16", state=state)


@BOTH
@pytest.mark.parametrize("segments", [1, 2])
def test_packed_sequences(segments: int, per_channel: bool) -> None:
    bounds = [0, 1, 1, 66, 130]  # of length one, empty, not a whole chunk, a whole one
    state = torch.randn(4, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    check(operands(1, 130, 1, 2, 16, 16, per_channel=per_channel), launch=f"segments={segments}", state=state,
          bounds=bounds)  # fmt: skip


@BOTH
@pytest.mark.parametrize("gate, beta", [("softplus", 1.0), ("bounded", 2.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gates_inside(gate: str, beta: float, dtype: torch.dtype, per_channel: bool) -> None:
    given = operands(1, 66, 1, 2, 16, 16, per_channel=per_channel, dtype=dtype)
    draw = torch.Generator().manual_seed(2)
    given["g"] = (4 * torch.randn(given["g"].shape, generator=draw)).to(dtype)
    given["beta"] = torch.randn(given["beta"].shape, generator=draw).to(dtype)
    bias = torch.randn(2, 16, generator=draw) if per_channel else torch.randn(2, generator=draw)
    check(given, gate=gate, a_log=torch.randn(2, generator=draw), dt_bias=bias, beta_sigmoid=beta)


@BOTH
@pytest.mark.parametrize("strength", [0.0, 0.01, 2.0, 12.0, 400.0])
def test_decays_of_every_strength(strength: float, per_channel: bool) -> None:
    """From none at all to more than 2^126 within a token: every choice of exact block sizes."""
    check(operands(1, 130, 1, 1, 16, 16, per_channel=per_channel, decay=strength))


@BOTH
def test_channels_of_different_strength(per_channel: bool) -> None:
    given = operands(1, 130, 1, 2, 16, 16, per_channel=per_channel)
    strength = torch.logspace(-3, 2, given["g"].shape[-1])
    given["g"] = given["g"] * strength
    given["g"][:, 40] = -math.inf
    given["g"][:, 70:75] = 0.0
    check(given)


@BOTH
def test_nothing_is_written_and_nothing_is_kept(per_channel: bool) -> None:
    given = operands(1, 70, 1, 1, 16, 16, per_channel=per_channel)
    given["beta"][:, 10:30] = 0.0
    check(given)


@BOTH
def test_strides_are_read_in_place(per_channel: bool) -> None:
    given = operands(1, 70, 1, 2, 16, 16, per_channel=per_channel)
    rows = torch.cat([given[name].flatten(2) for name in "qkv"], dim=-1)  # one row per token, as a projection gives it
    parts = rows.split([16, 16, 32], dim=-1)
    given |= {name: part.unflatten(-1, (-1, 16)) for name, part in zip("qkv", parts)}
    given["beta"] = given["beta"].transpose(1, 2).contiguous().transpose(1, 2)
    check(given)


@BOTH
def test_without_norms(per_channel: bool) -> None:
    check(operands(1, 70, 1, 1, 16, 16, per_channel=per_channel), norm_eps=None)


@BOTH
def test_nearly_equal_keys(per_channel: bool) -> None:
    """The triangular system at its worst: all keys alike, hardly any decay."""
    given = operands(1, 128, 1, 1, 16, 16, per_channel=per_channel, decay=1e-3)
    given["k"] = given["k"][:, :1] + 0.05 * given["k"]
    check(given)
