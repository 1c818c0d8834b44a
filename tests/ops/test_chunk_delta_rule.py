"""`torch.ops.fusion_passes.chunk_delta_rule` on CPU: the reference, the schema, what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from fusion_passes.ops.chunk_delta_rule import OP, chunk_delta_rule, reference
from tests.support.delta_rule import operands, recurrence

Tensor = torch.Tensor
BOTH = pytest.mark.parametrize("per_channel", [False, True], ids=["per_head", "per_channel"])


def close(actual: Tensor | None, exact: Tensor, bound: float = 2e-6) -> None:
    assert actual is not None and actual.shape == exact.shape
    assert actual.isfinite().all()
    assert (actual.double() - exact).norm() <= bound * exact.norm().clamp_min(1e-30)


def state_for(drawn: dict[str, Any], count: int | None = None) -> Tensor:
    batch, _, heads, value = drawn["v"].shape
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count or batch, heads, drawn["k"].shape[-1], value, generator=generator)


@BOTH
@pytest.mark.parametrize("tokens", [1, 15, 16, 70])
@pytest.mark.parametrize("with_state", [False, True])
def test_values(per_channel: bool, tokens: int, with_state: bool) -> None:
    drawn = operands(tokens=tokens, per_channel=per_channel)
    state = state_for(drawn) if with_state else None
    o, final = chunk_delta_rule(**drawn, initial_state=state, norm_eps=1e-6, scale=0.3, output_final_state=True)
    exact, exact_final = recurrence(**drawn, initial_state=state, norm_eps=1e-6, scale=0.3)
    assert o.is_contiguous() and o.dtype == torch.float32
    close(o, exact)
    close(final, exact_final)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_result_alone(dtype: torch.dtype) -> None:
    drawn = operands(dtype=dtype)
    o, final = chunk_delta_rule(**drawn, output_final_state=True)
    exact, exact_final = recurrence(**drawn, scale=drawn["k"].shape[-1] ** -0.5)
    assert o.dtype == dtype and final is not None and final.dtype == torch.float32
    close(o, exact, torch.finfo(dtype).eps / 2)
    close(final, exact_final)
    assert chunk_delta_rule(**drawn, out_dtype=torch.float32)[0].dtype == torch.float32


@BOTH
@pytest.mark.parametrize("lengths", [[33], [0, 5, 0, 16, 33, 0], [1, 1, 1]])
def test_packed_sequences(per_channel: bool, lengths: list[int]) -> None:
    drawn = operands(batch=1, tokens=sum(lengths), per_channel=per_channel)
    bounds = [0, *itertools.accumulate(lengths)]
    state = state_for(drawn, len(lengths))
    o, final = chunk_delta_rule(
        **drawn, scale=1.0, initial_state=state, cu_seqlens=torch.tensor(bounds), output_final_state=True
    )
    exact, exact_final = recurrence(**drawn, initial_state=state, bounds=bounds)
    close(o, exact)
    close(final, exact_final)


def test_no_tokens_keep_the_state() -> None:
    drawn = operands(tokens=0)
    state = state_for(drawn)
    o, final = chunk_delta_rule(**drawn, initial_state=state, output_final_state=True)
    assert o.shape == (2, 0, 4, 16) and final is not None and torch.equal(final, state)
    assert final.data_ptr() != state.data_ptr()


@pytest.mark.parametrize("gate", ["softplus", "bounded"])
@BOTH
def test_gates(per_channel: bool, gate: str) -> None:
    drawn = operands(per_channel=per_channel)
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(drawn["g"].shape, generator=generator) * 8
    shapes = [(4,), (4, 8)] if per_channel else [(4,)]
    for a_shape, bias_shape in itertools.product(shapes, [*shapes, None]):
        a_log = torch.rand(a_shape, generator=generator)
        bias = None if bias_shape is None else torch.randn(bias_shape, generator=generator)
        rate = a_log.double().exp() if len(a_shape) == 2 or not per_channel else a_log.double().exp()[:, None]
        z = raw.double()
        if bias is not None:
            z = z + (bias if bias.dim() == 2 or not per_channel else bias[:, None]).double()
        decay = -5.0 / (1 + (-rate * z).exp()) if gate == "bounded" else -rate * z.exp().log1p()
        o, _ = chunk_delta_rule(**{**drawn, "g": raw}, a_log=a_log, dt_bias=bias, gate=gate, scale=1.0)
        close(o, recurrence(**{**drawn, "g": decay})[0])


def test_beta_as_a_sigmoid() -> None:
    drawn = operands()
    raw = drawn["beta"] * 20 - 10
    exact, _ = recurrence(**{**drawn, "beta": 2 / (1 + (-raw.double()).exp())})
    close(chunk_delta_rule(**{**drawn, "beta": raw}, beta_sigmoid=2.0, scale=1.0)[0], exact)


@BOTH
def test_strong_decays_are_exact(per_channel: bool) -> None:
    """A product of 126 halvings within a chunk neither overflows nor costs digits of what decays slowly."""
    drawn = operands(per_channel=per_channel, tokens=40)
    drawn["g"][:, ::5] = -90.0
    drawn["g"][:, 3] = 0.0
    drawn["g"][0, 20:24] = -1e4
    close(chunk_delta_rule(**drawn, scale=1.0)[0], recurrence(**drawn)[0])


@BOTH
def test_an_infinite_decay_empties_the_state(per_channel: bool) -> None:
    drawn = operands(per_channel=per_channel, tokens=40)
    drawn["g"][:, 5, 0] = drawn["g"][:, 21, :2] = drawn["g"][:, 22] = -math.inf
    o, final = chunk_delta_rule(**drawn, scale=1.0, output_final_state=True)
    exact, exact_final = recurrence(**drawn)
    close(o, exact)
    close(final, exact_final)


def test_nothing_is_written_where_beta_is_zero() -> None:
    drawn = operands()
    drawn["beta"].zero_()
    state = state_for(drawn)
    o, final = chunk_delta_rule(**drawn, initial_state=state, output_final_state=True)
    exact = state.double() * drawn["g"].double().sum(1).exp()[..., None, None]
    close(final, exact)


def test_strided_operands_and_float64() -> None:
    drawn = operands(tokens=20)
    strided = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in drawn.items()}
    assert torch.equal(chunk_delta_rule(**strided)[0], chunk_delta_rule(**drawn)[0])
    args: list[Any] = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments(drawn)]
    o, _ = reference(*args)
    assert o.dtype == torch.float64
    torch.testing.assert_close(o, recurrence(**drawn)[0], rtol=1e-10, atol=1e-12)


def arguments(drawn: dict[str, Any], **changes: Any) -> tuple[Any, ...]:
    """Arguments of the op in order, some of them replaced by name."""
    values = {
        **drawn, "a_log": None, "dt_bias": None, "initial_state": None, "cu_seqlens": None, "scale": 1.0,
        "norm_eps": None, "gate": "log", "lower_bound": 0.0, "beta_sigmoid": None, "out_dtype": torch.float32,
        "output_final_state": False,
    }  # fmt: skip
    assert set(changes) <= set(values)
    return tuple({**values, **changes}.values())


@pytest.mark.parametrize(
    "args",
    [
        arguments(operands(tokens=5)),
        arguments(operands(tokens=5, per_channel=True), a_log=torch.rand(4, 8), gate="softplus", norm_eps=1e-6),
        arguments(operands(tokens=5), initial_state=torch.rand(2, 4, 8, 16), output_final_state=True, beta_sigmoid=2.0),
        arguments(operands(1, 5), cu_seqlens=torch.tensor([0, 2, 5]), out_dtype=torch.bfloat16),
    ],
)
def test_schema(args: tuple[Any, ...]) -> None:
    torch.library.opcheck(OP, args)


def _with(**changes: Any) -> dict[str, Any]:
    return changes


GOOD = operands(tokens=5)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    (_with(q=GOOD["q"][0]), ValueError, r"q must be \[B, T, HK, K\], got shape \[5, 2, 8\]"),
    (_with(k=GOOD["k"][:, :4]), ValueError, r"k must be \[B, T, HK, K\] as q = \[2, 5, 2, 8\]"),
    (_with(v=GOOD["v"][..., 0]), ValueError, r"v must be \[B, T, HV, V\], got"),
    (_with(v=GOOD["v"][:, :, :3]), ValueError, "multiple of the 2 heads of q and k, got 3"),
    (_with(g=GOOD["g"][..., :2]), ValueError, r"g must be \[B, T, HV\] or"),
    (_with(g=torch.rand(2, 5, 4, 7)), ValueError, r"\[B, T, HV, K\] = \[2, 5, 4, 8\]"),
    (_with(beta=GOOD["beta"][:1]), ValueError, r"beta must be \[B, T, HV\] = \[2, 5, 4\]"),
    (_with(q=GOOD["q"].transpose(1, 3).contiguous().transpose(1, 3)), ValueError, "q must have stride 1"),
    (_with(q=GOOD["q"].int()), TypeError, "q must be bfloat16, float16 or float32, got torch.int32"),
    (_with(beta=GOOD["beta"].double()), TypeError, "beta must be bfloat16"),
    (_with(g=GOOD["g"].to("meta")), ValueError, r"g must be on the device of q \(cpu\), got meta"),
    (_with(cu_seqlens=torch.tensor([0, 5], device="meta")), ValueError, r"cu_seqlens must be on the device of q"),
    (_with(k=GOOD["k"].transpose(1, 3).contiguous().transpose(1, 3)), ValueError, "k must have stride 1"),
    (_with(g=torch.rand(2, 5, 8, 4).mT), ValueError, "g must have stride 1 along its last axis"),
    (_with(out_dtype=torch.float64), TypeError, "out_dtype must be"),
    (_with(gate="sigmoid"), ValueError, "gate must be one of 'log', 'softplus', 'bounded', got 'sigmoid'"),
    (_with(gate="softplus"), ValueError, "a_log must be a tensor with gate='softplus', got None"),
    (_with(a_log=torch.rand(4)), ValueError, "a_log must be None with gate='log'"),
    (_with(a_log=torch.rand(3), gate="softplus"), ValueError, r"a_log must be \[HV\], as g has no channels = \[4\]"),
    (_with(a_log=torch.rand(4, 8), gate="softplus"), ValueError, r"a_log must be \[HV\]"),
    (_with(a_log=torch.rand(4), gate="bounded", lower_bound=1.0), ValueError, "not above 0, got 1.0"),
    (_with(scale=math.inf), ValueError, "scale must be finite, got inf"),
    (_with(norm_eps=-1.0), ValueError, "norm_eps must not be negative"),
    (_with(norm_eps=math.nan), ValueError, "norm_eps must be finite, got nan"),
    (_with(beta_sigmoid=math.inf), ValueError, "beta_sigmoid must be finite, got inf"),
    (_with(dt_bias=torch.rand(4)), ValueError, r"dt_bias must be None with gate='log'.*got \[4\]"),
    (_with(initial_state=torch.rand(2, 4, 16, 8)), ValueError, r"must be \[B, HV, K, V\] = \[2, 4, 8, 16\]"),
    (_with(initial_state=torch.rand(2, 4, 16, 8).mT), ValueError, "initial_state must be contiguous"),
    (_with(cu_seqlens=torch.tensor([0, 5])), ValueError, "q must have B = 1 with cu_seqlens"),
    (_with(cu_seqlens=torch.tensor([0.0, 5.0])), TypeError, "cu_seqlens must be int32 or int64"),
    (_with(cu_seqlens=torch.tensor(5)), ValueError, r"cu_seqlens must be \[S \+ 1\]"),
    (_with(cu_seqlens=torch.tensor([0, 1, 5, 1])[::2]), ValueError, "cu_seqlens must be contiguous"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OP(*arguments(GOOD, **changes))


@pytest.mark.parametrize(
    ("bounds", "message"), [([0, 4], "end at T = 5, got 0 and 4"), ([0, 4, 3, 5], "must not decrease, got 4, 3")]
)
def test_bounds_are_checked_on_the_host(bounds: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chunk_delta_rule(**operands(1, 5), cu_seqlens=torch.tensor(bounds))


def test_there_is_no_gradient() -> None:
    drawn = operands(tokens=5)
    drawn["v"].requires_grad_()
    with pytest.raises(NotImplementedError, match="has no gradient"):
        chunk_delta_rule(**drawn)[0].sum().backward()
