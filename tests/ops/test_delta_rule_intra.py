"""`torch.ops.fusion_passes.delta_rule_intra` on CPU: the reference, the schema, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fusion_passes import benchmarking
from fusion_passes.ops._delta_rule_intra_cases import _case, cases
from fusion_passes.ops.chunk_delta_rule import chunk_delta_rule
from fusion_passes.ops.delta_rule_intra import OP, delta_rule_intra
from tests.support.delta_rule import operands
from tests.support.delta_rule_intra import exact, intra_operands, sums_of

Tensor = torch.Tensor
BOTH = pytest.mark.parametrize("per_channel", [False, True], ids=["per_head", "per_channel"])


def close(actual: Tensor | None, wanted: Tensor | None, bound: float = 2e-6) -> None:
    assert actual is not None and wanted is not None and actual.shape == wanted.shape
    assert actual.isfinite().all()
    assert (actual.double() - wanted).norm() <= bound * wanted.norm().clamp_min(1e-30)


def check(given: dict[str, Any], bound: float = 2e-6, **options: Any) -> None:
    options = {"scale": 0.3, "norm_eps": 1e-6, **options}
    wanted = exact(**given, scale=options["scale"], norm_eps=options["norm_eps"])
    for actual, expected in zip(delta_rule_intra(**given, **options), wanted):
        if expected is not None:
            close(actual, expected, bound)


def small(**sizes: Any) -> dict[str, Any]:
    return intra_operands(**{"key": 16, "value": 32, "tokens": 40, "chunk": 16, **sizes})


@BOTH
@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 16, 70])
def test_values(per_channel: bool, tokens: int, chunk: int) -> None:
    check(small(tokens=tokens, chunk=chunk, per_channel=per_channel))
    check(small(tokens=tokens, chunk=chunk, per_channel=per_channel, query=False), norm_eps=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_results_alone(dtype: torch.dtype) -> None:
    given = small(dtype=dtype)
    assert all(result is not None and result.dtype == torch.float32 for result in delta_rule_intra(**given))
    check(given)
    check(given, torch.finfo(dtype).eps / 2, out_dtype=dtype)


@BOTH
def test_results_side_by_side_and_by_columns(per_channel: bool) -> None:
    given = small(per_channel=per_channel)
    u, w, pairs = delta_rule_intra(**given)
    assert w is not None and pairs is not None and u.is_contiguous() and w.is_contiguous()
    for results, parts in (("uw", [u, w]), ("wu", [w, u])):
        for columns in (False, True):
            both, none, again = delta_rule_intra(**given, results=results, columns=columns, chunks_first=columns)
            assert none is None and again is not None
            assert torch.equal(both, torch.cat(parts, -1)) and torch.equal(again, pairs)
            assert (both.mT if columns else both).is_contiguous()
            assert (again.movedim(2, 0) if columns else again).is_contiguous()


@BOTH
def test_strong_decays_are_exact(per_channel: bool) -> None:
    """A product of 126 halvings within a chunk neither overflows nor costs digits of what decays slowly."""
    drawn = operands(key=16, value=32, tokens=40, per_channel=per_channel)
    drawn["g"][:, ::5] = -90.0
    drawn["g"][:, 3] = 0.0
    given = {**{name: drawn[name] for name in ("k", "v")}, "sums": sums_of(drawn["g"], 16),
             "beta": drawn["beta"], "q": drawn["q"]}  # fmt: skip
    check(given)


@BOTH
def test_no_decay_no_write_and_decay_to_nothing(per_channel: bool) -> None:
    given = small(per_channel=per_channel)
    given["sums"][:, 0] = 0.0
    given["sums"][:, 1, :, 9:] = -math.inf
    given["beta"][:, 10:20] = 0.0
    check(given)
    u, w, _ = delta_rule_intra(**given)
    assert w is not None and not w[:, 1, 0, 9:].any()  # nothing of the state is left to be read
    assert not u.transpose(1, 2).flatten(2, 3)[:, :, :0].any()


@BOTH
def test_a_scan_over_the_results_is_the_delta_rule(per_channel: bool) -> None:
    drawn = operands(key=16, value=32, per_channel=per_channel)
    sums = sums_of(drawn["g"], 16)
    u, w, pairs = delta_rule_intra(drawn["k"], drawn["v"], sums, drawn["beta"], drawn["q"], norm_eps=1e-6)
    assert w is not None and pairs is not None
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (drawn["q"], drawn["k"]))
    q, k = (sums_like(x.repeat_interleave(2, 2), 16) for x in (q * 0.25, k))
    wide = sums if per_channel else sums.unsqueeze(-1)
    state, outputs = torch.zeros(2, 4, 16, 32), []
    for n in range(sums.shape[2]):
        written = u[:, :, n] - w[:, :, n] @ state
        outputs.append((q[:, :, n] * wide[:, :, n].exp()) @ state + pairs[:, :, n] @ written)
        last = wide[:, :, n, -1:]
        state = last.exp().mT * state + (k[:, :, n] * (last - wide[:, :, n]).exp()).mT @ written
    o, _ = chunk_delta_rule(**drawn, norm_eps=1e-6)
    close(torch.cat(outputs, 2)[:, :, :70].transpose(1, 2), o.double(), 1e-5)


def sums_like(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] as [B, H, N, C, D], padded with zeros."""
    x = torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(2, (-1, chunk))


@BOTH
@pytest.mark.parametrize("form", [{}, {"pairs": True}, {"pairs": True, "model": True}, {"strong": True}], ids=str)
def test_benchmarked_forms(per_channel: bool, form: dict[str, bool]) -> None:
    """The op, the plain spelling and the reference have the same results; the case's bytes are theirs."""
    case = _case(per_channel, 1, 1 if per_channel else 2, 128, **form)
    args = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))
    exact = benchmarking.exact_result(case, args)
    assert case.plain is not None and case.bound is not None
    for function in (case.op, case.plain):
        assert benchmarking.relative_error(function(*args), exact) <= (1e-5 if "model" in form else case.bound)
    tensors = [x for x in (*args[:5], *case.op(*args)) if x is not None]
    assert case.bytes == sum(x.nbytes for x in tensors)


def test_benchmarked_shapes() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names) and {"KDA 32/32x128 T=16384", "GDN 16/32x128 T=512"} <= set(names)
    assert all(case.fusion_name == "delta_rule_intra" for case in cases())


@BOTH
def test_schema(per_channel: bool) -> None:
    given = small(per_channel=per_channel, batch=1)
    for form in (("u,w", False, False), ("wu", True, True)):
        torch.library.opcheck(OP, (*given.values(), 1.0, 1e-6, *form, torch.float32))
        torch.library.opcheck(OP, (*given.values(), 1.0, None, *form, torch.bfloat16))


def test_no_chunks() -> None:
    given = small(tokens=0)
    u, w, pairs = delta_rule_intra(**given)
    assert u.shape == (2, 4, 0, 16, 32) and w is not None and w.shape == (2, 4, 0, 16, 16)
    assert pairs is not None and pairs.shape == (2, 4, 0, 16, 16)


GOOD = small()
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": GOOD["k"].double()}, TypeError, "k must be bfloat16, float16 or float32, got torch.float64"),
    ({"q": GOOD["q"].int()}, TypeError, "q must be bfloat16"),
    ({"sums": GOOD["sums"].bfloat16()}, TypeError, "sums must be float32, got torch.bfloat16"),
    ({"v": GOOD["v"].double()}, TypeError, "v must be bfloat16, float16 or float32, got torch.float64"),
    ({"beta": GOOD["beta"].double()}, TypeError, "beta must be bfloat16, float16 or float32, got torch.float64"),
    ({"out_dtype": torch.float64}, TypeError, "out_dtype must be"),
    ({"v": GOOD["v"].to("meta")}, ValueError, r"v must be on the device of k \(cpu\), got meta"),
    ({"k": GOOD["k"][0]}, ValueError, r"k must be \[B, T, HK, K\], got shape \[40, 2, 16\]"),
    ({"k": GOOD["k"][..., :8], "q": None}, ValueError, "k must have 16 to 256 channels, a multiple of 16, got 8"),
    ({"v": GOOD["v"][:, :9]}, ValueError, r"v must be \[B, T, HV, V\] with B and T of k"),
    ({"v": GOOD["v"][:, :, :3]}, ValueError, "v must have a multiple of the 2 heads of k, got 3"),
    ({"beta": GOOD["beta"][:, :, :2]}, ValueError, r"beta must be \[B, T, HV\] = \[2, 40, 4\], got shape \[2, 40, 2\]"),
    ({"q": GOOD["q"][:, :, :1]}, ValueError, r"q must be \[B, T, HK, K\] as k"),
    ({"k": GOOD["k"].transpose(2, 3).contiguous().transpose(2, 3)}, ValueError, "k must have stride 1"),
    ({"sums": GOOD["sums"][0]}, ValueError, r"sums must be \[B, HV, N, C\] or \[B, HV, N, C, K\], got shape"),
    ({"sums": GOOD["sums"][..., :8]}, ValueError, "sums must have chunks of 16, 32, 64 tokens, got 8"),
    ({"sums": GOOD["sums"][:, :2]}, ValueError, r"sums must be \[B, HV, N, C\]"),
    ({"sums": GOOD["sums"][:, :, :2]}, ValueError, "sums must have chunks for all 40 tokens, got 2 of 16"),
    ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
    ({"norm_eps": -1.0}, ValueError, "norm_eps must be finite and not negative, got -1.0"),
    ({"results": "vw"}, ValueError, "results must be one of 'u,w', 'uw', 'wu', got 'vw'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        delta_rule_intra(**{**GOOD, **changes})


def test_channels_next_to_one_another() -> None:
    given = small(per_channel=True)
    given["sums"] = given["sums"].transpose(3, 4).contiguous().transpose(3, 4)
    with pytest.raises(ValueError, match="sums must have stride 1 along its last axis"):
        delta_rule_intra(**given)


def test_there_is_no_gradient() -> None:
    given = small()
    given["v"].requires_grad_()
    with pytest.raises(NotImplementedError, match="has no gradient"):
        delta_rule_intra(**given)[0].sum().backward()
