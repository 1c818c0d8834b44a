"""Rotary embedding written back in place: found whatever the spelling, and only where it is a rotation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusion_passes
from fusion_passes.patterns import redundant_copy
from fusion_passes.testing import assert_same, run_fused
from tests.patterns.test_redundant_copy import OWN, behind_pass, same_as_eager
from tests.support.redundant_copy import run_after_passes
from tests.support.redundant_copy_rows import rope, rotated_product

NAME = "redundant_copy"
T, H, D, R = 6, 2, 12, 8  # tokens, heads, channels, rotated channels


def inputs(*, batched: bool = False) -> list[Tensor]:
    """A query [T, H, D] (or [2, H, T, D]), cosines and sines [T, 1, R / 2] of angles that differ everywhere."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(T, 1, R // 2, generator=generator)
    shape = (2, H, T, D) if batched else (T, H, D)
    return [torch.randn(shape, generator=generator), angles.cos(), angles.sin()]


# --- spellings --------------------------------------------------------------------------------------------------------


def neox(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    q[..., :R] = rope(q[..., :R], cos, sin)


def copied_back(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    part = q[..., :R]
    part.copy_(rope(part, cos, sin))


def last_channels(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    q[..., -R:] = rope(q[..., -R:], cos, sin)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : R // 2], x[..., R // 2 :]
    return torch.cat((-second, first), dim=-1)


def hugging_face(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    part = q[..., :R]
    q[..., :R] = part * cos + rotate_half(part) * sin


def sines_first(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    a, b = q[..., :R].unflatten(-1, (2, -1)).unbind(-2)
    q[..., :R] = torch.stack([a * cos - sin * b, sin * a + cos * b], -2).flatten(-2)


def interleaved(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    a, b = q[..., :R:2], q[..., 1:R:2]
    q[..., :R] = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def interleaved_pairs(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    a, b = q[..., :R].reshape(T, H, -1, 2).unbind(-1)
    q[..., :R] = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).reshape(T, H, R)


def interleaved_repeated(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    part = q[..., :R]
    turned = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    q[..., :R] = part * cos + turned * sin


def in_float32(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    q[..., :R] = rope(q[..., :R].float(), cos.float(), sin.float()).to(q.dtype)


def by_halves(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    a, b = q[..., : R // 2].clone(), q[..., R // 2 : R].clone()
    q[..., : R // 2] = a * cos - b * sin
    q[..., R // 2 : R] = b * cos + a * sin


def by_neighbours(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    a, b = q[..., 0:R:2].clone(), q[..., 1:R:2].clone()
    q[..., 0:R:2] = a * cos - b * sin
    q[..., 1:R:2] = b * cos + a * sin


def second_half_first(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    a, b = q[..., : R // 2] * 1, q[..., R // 2 : R] * 1
    q[..., R // 2 : R] = b * cos + a * sin
    q[..., : R // 2] = a * cos - b * sin


def back(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    q[..., :R] = rope(q[..., :R], cos, -sin)


def back_written_out(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    a, b = q[..., :R].chunk(2, -1)
    q[..., :R] = torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


def angles_in_the_graph(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    angles = torch.atan2(sin, cos)
    q[..., :R] = rope(q[..., :R], angles.cos(), angles.sin())


def different_halves(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    cos, sin = torch.cat([cos, cos + 1], -1), torch.cat([sin, sin * 2], -1)
    part = q[..., :R]
    q[..., :R] = part * cos + rotate_half(part) * sin


def all_channels(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    part = q[..., 4:]
    q[..., 4:] = rope(part, cos, sin)


def on_a_product(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = (q.flatten(1) @ q.new_ones(H * D, H * D)).view(T, H, D)
    x[..., :R] = rope(x[..., :R], cos, sin)
    return x


def on_a_product_by_halves(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = (q.flatten(1) @ q.new_ones(H * D, H * D)).view(T, H, D)
    by_halves(x, cos, sin)
    return x.relu()


def read_before_and_after(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    before = q.sin()
    neox(q, cos, sin)
    return before.sum(0) + q.sum(0)


SPELLINGS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        neox, copied_back, last_channels, hugging_face, sines_first, interleaved, interleaved_pairs,
        interleaved_repeated, in_float32, by_halves, by_neighbours, second_half_first, back, back_written_out,
        angles_in_the_graph, different_halves, all_channels, on_a_product, on_a_product_by_halves,
        read_before_and_after,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    report = same_as_eager(SPELLINGS[name], inputs(), run_after_passes)
    assert report.counts[NAME] == 1, report
    assert "rotated" in report.fused[0].reason


@pytest.mark.parametrize("name", ["neox", "hugging_face", "interleaved", "by_halves"])
def test_batch_heads_tokens(name: str) -> None:
    """[B, H, T, D] with factors that are the same for all heads and sequences."""

    def f(q: Tensor, cos: Tensor, sin: Tensor) -> None:
        SPELLINGS[name](q, cos.transpose(0, 1), sin.transpose(0, 1))

    report = same_as_eager(f, inputs(batched=True), behind_pass)
    assert report.counts[NAME] == 1, report


def test_a_tensor_with_strides() -> None:
    q, cos, sin = inputs(batched=True)
    turned = q.transpose(1, 2)

    def f(q: Tensor, cos: Tensor, sin: Tensor) -> None:
        neox(q, cos, sin)

    theirs, ours = turned.clone(), turned.clone()
    f(theirs, cos, sin)
    _, report = run_fused(f, ours, cos, sin, **OWN)
    assert_same(ours, theirs)
    assert report.counts[NAME] == 1, report


def whole(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    x.copy_(rope(x, cos, sin))


def whole_slice(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    x[..., :R] = rope(x[..., :R], cos, sin)


def whole_hugging_face(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    turned = rotate_half(x) * sin
    x.mul_(cos).add_(turned)


def whole_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    x.copy_(torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2))


@pytest.mark.parametrize("function", [whole, whole_slice, whole_hugging_face, whole_interleaved])
def test_all_channels_are_rotated(function: Callable[..., Any]) -> None:
    q, cos, sin = inputs()
    report = same_as_eager(function, [q[..., :R].contiguous(), cos, sin], run_after_passes)
    assert report.counts[NAME] == 1, report
    assert "rotated" in report.fused[0].reason


def test_all_channels_of_bfloat16_by_float32_factors() -> None:
    q, cos, sin = inputs()
    args = q[..., :R].bfloat16(), cos, sin
    theirs, ours = args[0].clone(), args[0].clone()
    whole(theirs, cos, sin)
    _, report = run_fused(whole, ours, cos, sin, **OWN)
    assert report.counts[NAME] == 1, report
    assert_same(ours, theirs, rtol=1e-2, atol=1e-2)


def test_factors_that_are_overwritten_first() -> None:
    """The writes into inputs stand in the order of the inputs: the factors are gone when the rotation is due."""

    def f(factors: Tensor, x: Tensor) -> None:
        whole(x, *factors)
        factors.zero_()

    q, *factors = inputs()
    report = same_as_eager(f, [torch.stack(factors), q[..., :R].contiguous()], behind_pass)
    assert report.counts[NAME] == 0
    assert any("by which" in refusal.reason for refusal in report.refusals), report


# --- look-alikes ------------------------------------------------------------------------------------------------------


def _with(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def f(q: Tensor, cos: Tensor, sin: Tensor) -> None:
        q[..., :R] = change(q[..., :R], cos, sin)

    return f


def _halves(change: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    return _with(lambda x, c, s: torch.cat(change(*x.chunk(2, -1), c, s), -1))


def one_row_left(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    q[..., :R] = torch.cat([q[:1, :, :R], rope(q[1:, :, :R], cos[1:], sin[1:])])


def also_used(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = rope(q[..., :R], cos, sin)
    q[..., :R] = turned
    return turned.sin()


def half_read(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = q[..., : R // 2].clone(), q[..., R // 2 : R].clone()
    q[..., : R // 2] = a * cos - b * sin
    between = q.sum(0)
    q[..., R // 2 : R] = b * cos + a * sin
    return between


def sequential(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The second half is computed from the new first one."""
    q[..., : R // 2] = q[..., : R // 2] * cos - q[..., R // 2 : R] * sin
    q[..., R // 2 : R] = q[..., R // 2 : R] * cos + q[..., : R // 2] * sin


LOOKALIKES: dict[str, Callable[..., Any]] = {
    "other_sign": _halves(lambda a, b, c, s: (a * c + b * s, b * c + a * s)),
    "swapped_halves": _halves(lambda a, b, c, s: (b * c + a * s, a * c - b * s)),
    "one_factor": _halves(lambda a, b, c, s: (a * c - b * c, b * c + a * c)),
    "scaled": _halves(lambda a, b, c, s: (2 * (a * c - b * s), 2 * (b * c + a * s))),
    "shifted": _halves(lambda a, b, c, s: (a * c - b * s + 1, b * c + a * s)),
    "squared": _halves(lambda a, b, c, s: (a * a * c - b * s, b * c + a * s)),
    "clamped": _halves(lambda a, b, c, s: ((a * c - b * s).clamp(max=100.0), b * c + a * s)),
    "roles_exchanged_in_one_half": _halves(lambda a, b, c, s: (a * c - b * s, b * s + a * c)),
    "rolled_factors": _halves(lambda a, b, c, s: (a * c - b * s, b * c.roll(1, -1) + a * s)),
    "rolled_pairs": _halves(lambda a, b, c, s: (a * c - b.roll(1, -1) * s, b * c + a.roll(1, -1) * s)),
    "other_tokens": _halves(lambda a, b, c, s: (a.flip(0) * c - b * s, b * c + a.flip(0) * s)),
    "in_float64": _with(lambda x, c, s: rope(x.double(), c, s).to(x.dtype)),
    "one_row_left": one_row_left,
    "sequential": sequential,
    "another_part": lambda q, c, s: q[..., :R].copy_(rope(q[..., 4:], c, s)),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes(name: str) -> None:
    report = same_as_eager(LOOKALIKES[name], inputs(), run_after_passes)
    assert not any("rotated" in record.reason for record in report.fused), report


@pytest.mark.parametrize("function", [also_used, half_read])
def test_what_others_read(function: Callable[..., Any]) -> None:
    """The rotated values are needed elsewhere, or the memory while it is half rotated."""
    report = same_as_eager(function, inputs(), run_after_passes)
    assert not any("rotated" in record.reason for record in report.fused), report


def test_an_old_version_that_is_returned() -> None:
    def f(q: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = (q.flatten(1) @ q.new_ones(H * D, H * D)).view(T, H, D)
        y = x.clone()
        y[..., :R] = rope(x[..., :R], cos, sin)
        return x, y

    report = same_as_eager(f, inputs(), behind_pass)
    assert report.counts[NAME] == 0
    assert any("is returned" in r.reason for r in report.refusals), report


def test_two_results_of_one_tensor() -> None:
    def f(q: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = (q.flatten(1) @ q.new_ones(H * D, H * D)).view(T, H, D)
        x[..., :R] = rope(x[..., :R], cos, sin)
        return x, x.clone()

    same_as_eager(f, inputs(), run_after_passes)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_few_tokens_of_a_product_are_left_to_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock needs one kernel there too, which copies what is not rotated: cheaper than a launch of its own."""
    q, cos, sin = inputs()
    args = [q.flatten(1), torch.ones(128 * H, H * D), torch.ones(T, 1, 32), torch.ones(T, 1, 32)]
    saved = 2 * 4 * T * H * (128 - 64)
    monkeypatch.setattr(redundant_copy, "ROTATION_BYTES", saved)
    assert run_fused(rotated_product, *args, fusions=NAME)[1].counts[NAME] == 1
    monkeypatch.setattr(redundant_copy, "ROTATION_BYTES", saved + 1)
    _, report = run_fused(rotated_product, *args, fusions=NAME)
    assert report.counts[NAME] == 0 and "costs less than a launch" in report.refusals[0].reason


def test_emulated_roundings_are_kept() -> None:
    with torch._inductor.config.patch(emulate_precision_casts=True):
        report = same_as_eager(neox, inputs(), behind_pass)
    assert report.counts[NAME] == 0


def test_symbolic_tokens() -> None:
    counts = []
    for tokens in (5, 9):
        q, cos, sin = torch.randn(tokens, H, D), torch.randn(tokens, 1, R // 2), torch.randn(tokens, 1, R // 2)
        for value in (q, cos, sin):
            torch._dynamo.mark_dynamic(value, 0)
        theirs = q.clone()
        neox(theirs, cos, sin)
        _, report = run_fused(neox, q, cos, sin, **OWN)
        assert_same(q, theirs)
        counts.append(report.counts[NAME])
    assert counts == [1, 1]


@pytest.mark.parametrize("name", ["neox", "by_neighbours", "on_a_product"])
def test_compiled_code(name: str) -> None:
    """With Inductor's code for the CPU, where the op is called as it is."""
    function = SPELLINGS[name]
    theirs, ours = inputs(), inputs()
    compiled = torch.compile(functools.partial(function), options=fusion_passes.options(**OWN, reference_on_cpu=True))
    with torch.no_grad():
        assert_same(compiled(*ours), function(*theirs))
    assert_same(ours, theirs)
    assert fusion_passes.report().counts[NAME] == 1


def test_readers_of_what_an_opaque_call_overwrites_come_first() -> None:
    """Inductor adds a fallback that mutates before the pointwise readers that it computes for its sake."""

    def layer(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        old = q * 2
        neox(q, cos, sin)
        k.copy_(old)

    query, cos, sin = inputs()
    ours = [query, torch.zeros_like(query), cos, sin]
    theirs = [tensor.clone() for tensor in ours]
    layer(*theirs)
    options = fusion_passes.options(fusions=NAME, always_profitable=True, reference_on_cpu=True)
    with torch.no_grad():
        torch.compile(layer, options=options)(*ours)
    assert fusion_passes.report().counts[NAME] == 1
    for actual, wanted in zip(ours, theirs):
        assert_same(actual, wanted)
