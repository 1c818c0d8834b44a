"""The kernels of `delta_rule_intra` against their definition in float64, on the interpreter; memory starts as NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fusion_passes import tuning
from fusion_passes.ops._delta_rule_intra_plan import plan
from tests.support.delta_rule_intra import exact, intra_operands, sums_of
from tests.support.programs import run

Tensor = torch.Tensor

# bfloat16: with a decay per channel one rounding of the factors of k k^T; u and w themselves are not rounded.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 3e-3}
BOTH = pytest.mark.parametrize("per_channel", [False, True])


def check(
    given: dict[str, Any], *, norm_eps: float | None = 1e-6, results: str = "u,w", columns: bool = False,
    chunks_first: bool = False, launch: str = "", tolerance: float | None = None,
) -> None:  # fmt: skip
    scale = 0.3
    with tuning.overriding(**({"delta_rule_intra": launch} if launch else {})):
        u, w, pairs = run(plan, (*given.values(), scale, norm_eps, results, columns, chunks_first, torch.float32))
    wanted_u, wanted_w, wanted_pairs = exact(**given, scale=scale, norm_eps=norm_eps)
    if results != "u,w":
        parts = u.split([wanted_u.shape[-1], wanted_w.shape[-1]][:: 1 if results == "uw" else -1], -1)
        u, w = parts if results == "uw" else parts[::-1]
    found = [("u", u, wanted_u), ("w", w, wanted_w)]
    found += [("pairs", pairs, wanted_pairs)] if wanted_pairs is not None else []
    for name, actual, wanted in found:
        assert bool(torch.isfinite(actual).all()), name
        error = float((actual.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
        assert error <= (tolerance or TOLERANCE[given["k"].dtype]), (name, error)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype, per_channel: bool) -> None:
    check(intra_operands(batch=1, key_heads=1, value_heads=2, key=32, value=16, per_channel=per_channel, dtype=dtype))


@BOTH
@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 70])
def test_chunks_and_tails(tokens: int, chunk: int, per_channel: bool) -> None:
    check(intra_operands(chunk, tokens=tokens, key_heads=1, value_heads=1, key=16, value=16, per_channel=per_channel))


@BOTH
@pytest.mark.parametrize("results", ["u,w", "uw", "wu"])
@pytest.mark.parametrize("columns", [False, True])
def test_memory_orders(results: str, columns: bool, per_channel: bool) -> None:
    given = intra_operands(
        32, batch=1, tokens=40, key_heads=1, value_heads=1, key=16, value=32, per_channel=per_channel, query=False
    )
    check(given, results=results, columns=columns)


@BOTH
@pytest.mark.parametrize("chunk", [16, 64])
def test_pairs_chunk_by_chunk(chunk: int, per_channel: bool) -> None:
    check(intra_operands(chunk, tokens=130, key_heads=1, value_heads=2, key=16, per_channel=per_channel),
          chunks_first=True)  # fmt: skip


@BOTH
@pytest.mark.parametrize("launch", ["key_block=64,value_block=128", "key_block=128,value_block=64"])
def test_blocks_of_channels(launch: str, per_channel: bool) -> None:
    given = intra_operands(tokens=20, batch=1, key_heads=1, value_heads=1, key=96, value=192, per_channel=per_channel)
    check(given, launch=launch)


@BOTH
@pytest.mark.parametrize("strength", [0.0, 0.01, 2.0, 12.0, 400.0])
def test_decays_of_every_strength(strength: float, per_channel: bool) -> None:
    """From none at all to more than 2^126 within a token: every choice of exact block sizes."""
    check(intra_operands(batch=1, tokens=64, key_heads=1, value_heads=1, key=16, value=16,
                         per_channel=per_channel, decay=strength), tolerance=3e-5)  # fmt: skip


@BOTH
def test_channels_of_different_strength(per_channel: bool) -> None:
    given = intra_operands(batch=1, key_heads=1, key=16, per_channel=per_channel, dtype=torch.bfloat16)
    given["sums"] *= torch.logspace(-3, 2, given["sums"].shape[-1])
    check(given)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decay_to_nothing_and_no_write(dtype: torch.dtype, per_channel: bool) -> None:
    given = intra_operands(batch=1, tokens=64, key_heads=1, key=16, per_channel=per_channel, dtype=dtype)
    given["sums"][:, 0, :, 20:] = -math.inf
    given["sums"][:, 1, :, 5:] = given["sums"][:, 1, :, 4:5]
    given["beta"][:, 10:30] = 0.0
    check(given)


@BOTH
def test_a_sum_that_is_no_number_is_not_hidden(per_channel: bool) -> None:
    given = intra_operands(batch=1, tokens=64, key_heads=1, value_heads=2, key=16, per_channel=per_channel)
    given["sums"][:, 0, :, 20] = math.nan
    u, w, pairs = run(plan, (*given.values(), 1.0, None, "u,w", False, False, torch.float32))
    for result in (u, w, pairs):
        assert bool(result[:, 0].isnan().any()) and not bool(result[:, 1].isnan().any())


@BOTH
def test_strides_are_read_in_place(per_channel: bool) -> None:
    given = intra_operands(32, batch=2, key_heads=1, value_heads=2, key=16, value=16, per_channel=per_channel)
    rows = torch.cat([given[name].flatten(2) for name in "qkv"], dim=-1)
    given |= {name: x.unflatten(-1, (-1, 16)) for name, x in zip("qkv", rows.split([16, 16, 32], dim=-1))}
    given["beta"] = given["beta"].mT.contiguous().mT
    given["sums"] = given["sums"].transpose(1, 2).contiguous().transpose(1, 2)
    check(given)


@BOTH
def test_without_norms(per_channel: bool) -> None:
    check(intra_operands(batch=1, key_heads=1, value_heads=1, key=16, per_channel=per_channel), norm_eps=None)


@BOTH
def test_nearly_equal_keys(per_channel: bool) -> None:
    """The triangular system at its worst: all keys alike, hardly any decay."""
    given = intra_operands(batch=1, tokens=64, key_heads=1, key=16, per_channel=per_channel, decay=1e-3)
    given["k"] = given["k"][:, :1] + 0.05 * given["k"]
    check(given, tolerance=2e-5)


def test_sums_of_a_decay_that_is_none_are_zero() -> None:
    assert not sums_of(torch.zeros(1, 5, 2), 16).any()
