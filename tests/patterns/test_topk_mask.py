"""A top-k that is only asked which: found in its spellings, refused where order or values matter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fusion_passes
from fusion_passes import hf_models
from fusion_passes.ops.topk_mask import LONGEST
from fusion_passes.patterns import topk_mask
from fusion_passes.testing import assert_fuses, assert_refuses, assert_same, run_fused
from tests.support.recompiles import graphs

NAME = "topk_mask"
KEYS, MOST = 40, 12


def scores(rows: int = 5, keys: int = KEYS) -> Tensor:
    return torch.randn(2, rows, keys, generator=torch.Generator().manual_seed(rows))


def hugging_face(x: Tensor) -> Tensor:
    chosen = x.topk(min(MOST, x.shape[-1]), dim=-1).indices.to(torch.int32)
    return chosen.new_ones(x.shape, dtype=torch.bool).scatter(-1, chosen.long(), False).unsqueeze(1)


def additive(x: Tensor) -> Tensor:
    hidden = torch.full_like(x, float("-inf"))
    return hidden.scatter_(-1, torch.topk(x, MOST)[1], 0.0)


def added(x: Tensor) -> Tensor:
    """As in DeepSeek's own code: the mask is added to the scores of the attention."""
    mask = torch.full(x.shape, float("-inf")).scatter(-1, x.topk(MOST, dim=-1)[1], 0)
    return ((x * 3).unsqueeze(1) + mask.unsqueeze(1)).softmax(-1)


def unsorted(x: Tensor) -> Tensor:
    mask = torch.zeros_like(x)
    mask.scatter_(2, torch.topk(x, k=MOST, dim=-1, sorted=False)[1], 1)
    return x.masked_fill(mask == 0, 0.0)


def smallest(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.int64).scatter(2, x.topk(MOST, largest=False).indices, 7)


def twice(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers share one selection; the second fills its mask only when the first is done."""
    chosen = x.topk(MOST).indices
    first = torch.ones_like(x).scatter(-1, chosen, 0.0).cumsum(1)
    return first, x.new_ones(x.shape, dtype=torch.bool).scatter(-1, chosen, False) & (first > 1)


def over_a_product(x: Tensor) -> Tensor:
    """What is written to is computed, and so are the scores."""
    return (x @ x.mT @ x).scatter(-1, (x @ x.mT @ x).exp().topk(MOST).indices, 3.0)


def one_row(x: Tensor) -> Tensor:
    return torch.ones(KEYS).scatter(0, x[0, 0].topk(2).indices, -2.5)


SPELLINGS = [hugging_face, additive, added, unsorted, smallest, twice, over_a_product, one_row]


@pytest.mark.parametrize("function", SPELLINGS)
def test_spellings(function: Callable[..., Any]) -> None:
    assert_fuses(function, scores(), fusion=NAME, always_profitable=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = torch.linspace(-2, 2, 5 * KEYS).view(5, KEYS).mT.contiguous().mT.contiguous().to(dtype)
    assert_fuses(hugging_face, x, fusion=NAME, always_profitable=True, rtol=0.0, atol=0.0)
    assert_fuses(additive, x, fusion=NAME, always_profitable=True, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("function", [hugging_face, smallest])
def test_special_scores(function: Callable[..., Any], value: float) -> None:
    """As many as are selected, or fewer, so that it is not open which."""
    x = scores()
    x[0, :3, :4], x[1, 2, ::4] = value, value
    assert_fuses(function, x, fusion=NAME, always_profitable=True)


def test_equal_scores() -> None:
    """PyTorch leaves open which of them are selected: any are right, as many as there are to be."""
    x = scores().relu().masked_fill(torch.ones(KEYS, KEYS).triu(1).bool()[:5], -math.inf)
    mask, report = run_fused(hugging_face, x, always_profitable=True)
    assert report.counts[NAME] == 1
    hidden = mask.squeeze(1)
    assert ((~hidden).sum(-1) == MOST).all()
    assert (x.masked_fill(hidden, math.inf).amin(-1) >= x.masked_fill(~hidden, -math.inf).amax(-1)).all()


def test_a_symbolic_number_of_rows() -> None:
    """One graph for all, with the op in it."""
    for function in (hugging_face, additive, over_a_product):
        x = scores(7)
        torch._dynamo.mark_dynamic(x, 1)
        assert_fuses(function, x, fusion=NAME, always_profitable=True, rtol=1e-6, atol=1e-6)


def test_every_number_of_rows_has_the_same_graph() -> None:
    inputs = [(scores(rows, 1024),) for rows in (7, 9, 3)]
    before = fusion_passes.report().counts[NAME]
    count = graphs(hugging_face, NAME, inputs, [(0, 1)], lambda found, args: assert_same(found, hugging_face(*args)))
    assert count == 1 and fusion_passes.report().counts[NAME] == before + 1


LOOKALIKES: dict[str, tuple[Callable[..., Any], str]] = {
    "all_of_them": (lambda x: torch.ones_like(x).scatter(-1, x.topk(KEYS).indices, 0.0), ""),
    "values_are_read": (
        lambda x: (lambda top: (torch.ones_like(x).scatter(-1, top[1], 0.0), top[0] + 1))(x.topk(MOST)), "",
    ),
    "order_matters": (lambda x: x.gather(-1, x.topk(MOST).indices), "its indices go to gather"),
    "sources_of_their_own": (
        lambda x: torch.ones_like(x).scatter(-1, x.topk(MOST).indices, x * 2), "its indices go to scatter",
    ),
    "constant_as_a_tensor": (
        lambda x: torch.ones_like(x).scatter(-1, x.topk(MOST).indices, torch.zeros_like(x)),
        "its indices go to scatter",
    ),
    "added_up": (
        lambda x: torch.ones_like(x).scatter_add(-1, x.topk(MOST).indices, x), "its indices go to scatter_add",
    ),
    "reduced": (
        lambda x: torch.ones_like(x).scatter(-1, x.topk(MOST).indices, 2.0, reduce="multiply"),
        "its indices go to scatter",
    ),
    "another_axis": (
        lambda x: torch.ones(MOST + KEYS, 5, KEYS).scatter(0, x.topk(MOST).indices, 0.0), "along another axis",
    ),
    "longer_rows": (
        lambda x: torch.ones(2, 5, KEYS + 1).scatter(-1, x.topk(MOST).indices, 0.0), "writes to a part of a tensor",
    ),
    "more_rows": (
        lambda x: torch.ones(2, 6, KEYS).scatter(-1, x.topk(MOST).indices, 0.0), "writes to a part of a tensor",
    ),
    "indices_as_values": (lambda x: x.topk(MOST).indices.float() * 2, "its indices go to"),
    "shifted": (lambda x: torch.ones_like(x).scatter(-1, x.topk(MOST).indices // 2, 0.0), "its indices go to"),
    "some_of_the_indices": (
        lambda x: torch.ones_like(x).scatter(-1, x.topk(MOST).indices[..., :4], 0.0), "its indices go to",
    ),
    "returned_too": (
        lambda x: (lambda top: (torch.ones_like(x).scatter(-1, top, 0.0), top))(x.topk(MOST)[1]), "its indices go to",
    ),
    "along_the_middle": (
        lambda x: torch.ones_like(x).scatter(1, x.topk(3, dim=1).indices, -2.5), "it selects along axis 1 of 3",
    ),
    "double": (
        lambda x: torch.ones_like(x).scatter(-1, x.double().topk(MOST).indices, 0.0), "scores is float64; the kernel",
    ),
    "whole_numbers": (
        lambda x: torch.ones_like(x).scatter(-1, (x * 1000).int().topk(MOST).indices, 0.0), "scores is int32",
    ),
    "columns_apart": (
        lambda x: torch.ones(2, 5, KEYS // 2).scatter(-1, x[..., ::2].topk(MOST).indices, 0.0),
        "reads rows of neighbouring entries",
    ),
    "three_strides": (
        lambda x: (lambda y: torch.ones(y.shape).scatter(-1, y.topk(3).indices, 0.0))(
            x.view(2, 5, 4, 10).transpose(0, 1)[:4, :, :3]
        ),
        "lie at more than two strides",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes(name: str) -> None:
    function, reason = LOOKALIKES[name]
    x = scores()
    assert_refuses(function, x, fusion=NAME, reason=reason, always_profitable=True)
    actual, _ = run_fused(function, x, always_profitable=True)
    torch.testing.assert_close(actual, function(x))


def test_all_of_the_entries_are_left_to_another_fusion() -> None:
    function, _ = LOOKALIKES["all_of_them"]
    for own in ({"always_profitable": True}, {"always_profitable": True, "fusions": NAME}):
        report = assert_refuses(function, scores(), fusion=NAME, dynamic=None, **own)
        assert report.counts["full_topk"] == ("fusions" not in own)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.uint8, 256), (torch.bfloat16, 257), (torch.float16, 2049)], ids=str
)
def test_casts_that_merge_positions(dtype: torch.dtype, most: int) -> None:
    """Indices may be cast to what tells all positions of a row apart, not only those that there are."""

    def function(x: Tensor) -> Tensor:
        return torch.ones_like(x).scatter(-1, x.topk(3).indices.to(dtype).long(), 0.0)

    assert_fuses(function, torch.randn(3, most), fusion=NAME, always_profitable=True, rtol=0.0, atol=0.0)
    longer = torch.randn(3, most + 1)
    assert_refuses(function, longer, fusion=NAME, reason="its indices go to convert", always_profitable=True)


@pytest.mark.parametrize("axis", [1, 2])
def test_symbolic_lengths_and_numbers(axis: int) -> None:
    """Nothing is known of k and the length where both depend on the same symbol."""
    x = scores()
    torch._dynamo.mark_dynamic(x, axis)
    function = (lambda x: hugging_face(x)) if axis == 2 else (
        lambda x: torch.ones_like(x).scatter(-1, x.topk(x.shape[1]).indices, 0.0)
    )  # fmt: skip
    report = assert_refuses(function, x, fusion=NAME, always_profitable=True)
    assert not [r for r in (*report.refusals, *report.near_misses) if r.fusion == NAME]


@pytest.mark.parametrize(
    ("length", "fused"), [(1023, False), (1024, True), (LONGEST, True), (LONGEST + 1, False)]
)
def test_lengths_that_pay(length: int, fused: bool) -> None:
    x = scores(1, length)
    if fused:
        assert_fuses(additive, x, fusion=NAME)
    else:
        assert_refuses(additive, x, fusion=NAME, reason="rows of 1,024 to 32,768 entries are measured to gain")
    # A program cannot hold a longer row, whatever it gains.
    _, report = run_fused(additive, x, always_profitable=True)
    assert report.counts[NAME] == (length <= LONGEST)


def test_a_base_that_is_written_in_between() -> None:
    """The mask is another one by the time that it is scattered into."""

    def function(x: Tensor, base: Tensor) -> Tensor:
        chosen = x.topk(MOST).indices
        base.mul_(2.0)
        return base.scatter(-1, chosen, 0.0)

    actual, _ = run_fused(function, scores(), torch.ones(2, 5, KEYS), always_profitable=True)
    torch.testing.assert_close(actual, function(scores(), torch.ones(2, 5, KEYS)))


@pytest.mark.parametrize(("fill", "number", "kernels"), [(False, True, 0), (True, False, 1), (False, False, 1)])
def test_a_mask_of_what_is_selected_is_that_of_the_op(fill: bool, number: bool, kernels: int) -> None:
    def function(x: Tensor) -> Tensor:
        return torch.full_like(x, fill, dtype=torch.bool).scatter(-1, x.topk(MOST).indices, number)

    compiled = torch.compile(function, backend="fusion_passes")
    with fusion_passes.config.patch(reference_on_cpu=True, always_profitable=True, strict=True):
        actual, (code,) = run_and_get_code(compiled, scores())
    assert torch.equal(actual, function(scores()))
    assert code.count("fusion_passes.topk_mask.default(") == 1
    assert len(re.findall(r"^\s+cpp_fused\w*\(", code, re.MULTILINE)) == kernels


def test_two_masks_of_one_selection_are_two_tensors() -> None:
    def masks(x: Tensor) -> tuple[Tensor, Tensor]:
        chosen = x.topk(MOST).indices
        first, second = (torch.zeros_like(x, dtype=torch.bool).scatter(-1, chosen, True) for _ in range(2))
        return first, second

    x = scores()
    (first, second), report = run_fused(masks, x, always_profitable=True)
    assert report.counts[NAME] == 1
    assert torch.equal(first, masks(x)[0]) and first.data_ptr() != second.data_ptr()
    first.logical_not_()
    assert torch.equal(second, masks(x)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_verify_draws_no_equal_scores(dtype: torch.dtype) -> None:
    for length in (2, 1024, LONGEST):
        drawn = topk_mask.distinct("scores", torch.randn(2, length).to(dtype))
        assert drawn.dtype == dtype and drawn.isfinite().all() and not drawn.isnan().any()
        assert all(len(row.unique()) == length for row in drawn.float())
    shared = topk_mask.distinct("scores", torch.randn(1, 40).expand(3, 40))
    assert shared.shape == (3, 40) and len(shared[2].unique()) == 40
    base = torch.ones(3)
    assert topk_mask.distinct("base_0", base) is base
    assert run_fused(additive, torch.zeros(2, 3, 1024, dtype=dtype), verify=True)[1].counts[NAME] == 1


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_the_selection_of_an_indexer(name: str) -> None:
    """One in each layer whose prompt is longer than the selection, beside the scores that it reads."""
    model, inputs = hf_models.build(name, dtype=torch.float32, layers=2, seq=80)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        with fusion_passes.config.patch(always_profitable=True):
            report = fusion_passes.explain(model, **inputs)
        found, rewritten = run_fused(lambda ids: model(ids).last_hidden_state, inputs["input_ids"],
                                     always_profitable=True, fusions=f"{NAME},index_score")  # fmt: skip
    assert report.counts[NAME] == report.counts["index_score"] == 2, report
    assert rewritten.counts == {NAME: 2, "index_score": 2}
    assert_same(found, expected, 1e-4, 1e-4)


def test_compiled_code_has_no_sort() -> None:
    from torch._inductor.utils import run_and_get_code

    x, codes = scores(), {}
    settings = {"reference_on_cpu": True, "strict": True, "always_profitable": True}
    for chosen in ("none", NAME):
        with fusion_passes.config.patch(**settings, fusions=chosen):
            found, (codes[chosen],) = run_and_get_code(torch.compile(added, backend="fusion_passes"), x)
        torch.testing.assert_close(found, added(x))
        torch._dynamo.reset()
    calls = ("aten.topk.default(", "fusion_passes.topk_mask.default(")
    assert [[call in codes[chosen] for call in calls] for chosen in codes] == [[True, False], [False, True]]


def test_training_keeps_gradients() -> None:
    x = scores().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return (x * hugging_face(x).squeeze(1).float() + x.pow(2)).sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    before = fusion_passes.report().counts[NAME]
    with fusion_passes.config.patch(reference_on_cpu=True, strict=True, always_profitable=True):
        (actual,) = torch.autograd.grad(torch.compile(loss, backend="fusion_passes")(x), x)
    torch.testing.assert_close(actual, expected)
    assert fusion_passes.report().counts[NAME] == before + 1
