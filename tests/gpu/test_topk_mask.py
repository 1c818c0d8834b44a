"""`topk_mask` on a GPU: every length, k and dtype against the reference and torch.topk, CUDA graphs, inlined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusion_passes
from fusion_passes import benchmarking, tuning
from fusion_passes.lowering import inlining
from fusion_passes.ops._topk_mask_cases import plain
from fusion_passes.ops.topk_mask import LONGEST, OP, cases, reference, topk_mask
from fusion_passes.testing import assert_op, run_fused
from tests.support.topk_mask import DTYPES, REGIMES, drawn, launch, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LENGTHS = [1, 2, 31, 32, 33, 255, 1000, 1024, 2047, 3072, 4096, 5001, 8192, 12345, 16384, 20000, LONGEST - 1, LONGEST]


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return drawn(*shape, dtype=dtype, seed=seed, device="cuda")


def check(scores: Tensor, k: int, largest: bool = True, forced: str = "") -> None:
    """Equal to the reference, ties included, and of the values that torch.topk selects.

    What is sorted for that is sorted on the CPU, where a NaN is the greatest number whatever its sign.
    """
    with tuning.overriding(**({"topk_mask": forced} if forced else {})):
        mask = launch(scores, k, largest)
        same(mask.cpu(), reference(scores.cpu(), k, largest))
        same(OP(scores, k, largest), mask)
    assert bool((mask.sum(-1) == k).all())
    values = scores.topk(k, largest=largest).values.cpu()
    selected = scores[mask].cpu().view(values.shape)
    torch.testing.assert_close(selected.sort(-1).values, values.sort(-1).values, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length: int, dtype: torch.dtype) -> None:
    scores = on_gpu(9, length, dtype=dtype, seed=length)
    for k in sorted({1, 2, length // 4, length // 2, length - 1, length} & set(range(1, length + 1))):
        for largest in (True, False):
            check(scores, k, largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(regime: str, largest: bool, dtype: torch.dtype) -> None:
    for rows, length in ((50, 200), (7, 3000), (3, 20000)):
        scores = REGIMES[regime](on_gpu(rows, length, dtype=dtype))
        for k in (1, length // 4, length - 1, length):
            check(scores, k, largest)


@pytest.mark.parametrize("warps", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("regime", ["random", "few_values", "causal"])
def test_warps(warps: int, regime: str) -> None:
    for length in (40, 1000, 2048, 8192, LONGEST):
        if length <= 64 * 32 * warps:
            check(REGIMES[regime](on_gpu(5, length)), max(1, length // 3), forced=f"warps={warps}")


def test_the_mask_of_a_prompt() -> None:
    """Queries see the keys up to their own: the first have fewer than are selected."""
    tokens, k = 4096, 2048
    scores = REGIMES["causal"](on_gpu(1, tokens, tokens).relu())
    check(scores, k)
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril()
    assert bool((OP(scores, k, True)[0] & seen).sum(-1).eq(seen.sum(-1).clamp_max(k)).all())


@pytest.mark.parametrize("rows", [1, 131, 70_000])
def test_many_rows(rows: int) -> None:
    check(on_gpu(rows, 1100), 300)


# How [2, 6, T] may lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "wide_rows": lambda x: torch.nn.functional.pad(x, (8, 16), value=99.0)[..., 8 : x.shape[2] + 8],
    "odd_rows": lambda x: torch.nn.functional.pad(x, (3, 2), value=99.0)[..., 3 : x.shape[2] + 3],
    "every_other_row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "some_rows": lambda x: torch.nn.functional.pad(x, (0, 0, 2, 5))[:, 2 : x.shape[1] + 2],
    "axes_swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "batch_expanded": lambda x: x[:1].expand(x.shape),
    "one_row": lambda x: x[0, 0],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    for length in (1024, 1500, 4099):
        check(LAYOUTS[layout](on_gpu(2, 6, length, dtype=dtype)), 400)


def test_offsets_beyond_32_bits() -> None:
    """The last rows of 2.2 billion entries, against the same rows alone."""
    length = 16384
    scores = torch.empty(2**31 // length + 5_000, length, dtype=torch.bfloat16, device="cuda")
    for part in (slice(0, 50), slice(-50, None)):
        scores[part].copy_(on_gpu(50, length, dtype=torch.bfloat16))
    mask = OP(scores, 2048, True)
    for part in (slice(0, 50), slice(-50, None)):
        same(mask[part].contiguous(), reference(scores[part], 2048, True))


def test_opcheck() -> None:
    for args in ((on_gpu(3, 4, 1000), 7, True), (on_gpu(3, 9, 500)[:, 2:], 500, False), (on_gpu(0, 20), 3, True)):
        assert_op(OP, *args, exact=reference)


def test_cuda_graph() -> None:
    scores = on_gpu(100, 5000)
    topk_mask(scores, 1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = topk_mask(scores, 1000)
    scores.neg_()
    graph.replay()
    same(mask, reference(scores, 1000, True))


def test_few_binaries_serve_all_lengths() -> None:
    """One for lengths that are multiples of 16 and one for others, within a power of two, for any k and rows."""
    from fusion_passes.ops._topk_mask_kernel import topk_mask_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for cache in topk_mask_kernel.device_caches.values())

    check(on_gpu(3, 2064), 10)
    check(on_gpu(3, 2065), 10)
    before = compiled()
    for rows, length, k in ((7, 3000, 1), (5, 2080, 2080), (9, 4095, 77), (2, 4096, 5)):
        check(on_gpu(rows, length), k)
    assert compiled() == before


def masked(x: Tensor, weight: Tensor) -> Tensor:
    scores = x @ weight
    mask = torch.full_like(scores, float("-inf")).scatter_(-1, scores.topk(300).indices, 0.0)
    return (scores * 2 + mask).softmax(-1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_fused_and_inlined_in_compile(dynamic: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    weight = on_gpu(64, 2000)
    before = fusion_passes.report().counts["topk_mask"]
    compiled = torch.compile(masked, backend="fusion_passes", dynamic=None, fullgraph=True)
    for rows in (256, 301, 512):
        x = on_gpu(2, rows, 64, seed=rows)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 1)
        with torch.no_grad():
            actual, codes = run_and_get_code(compiled, x, weight)
            expected = masked(x, weight)
        # A product in another order of its sums may select another entry next to the limit.
        differ = ((actual > 0) != (expected > 0)).sum(-1)
        assert bool((differ <= 2).all()) and float((differ > 0).float().mean()) < 0.01
        for code in codes:
            body = code[code.index("def call(") :]
            assert body.count("topk_mask_kernel_0.run(") == 1 and "aten.topk.default(" not in body
            assert "torch.ops.fusion_passes.topk_mask.default(" not in body
    assert fusion_passes.report().counts["topk_mask"] > before


def test_opaque_call_agrees() -> None:
    scores = on_gpu(3, 100, 3000)
    inlined = torch.compile(lambda t: OP(t, 700, True), fullgraph=True)(scores)
    torch._dynamo.reset()
    with inlining(False):
        opaque = torch.compile(lambda t: OP(t, 700, True), fullgraph=True)(scores)
    same(inlined, reference(scores, 700, True))
    same(opaque, inlined)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_verify(dtype: torch.dtype) -> None:
    """With scores of which no two are equal, so that it is not open which are selected."""

    def function(x: Tensor) -> Tensor:
        return torch.full_like(x, float("-inf")).scatter(-1, x.topk(500).indices, 0.0)

    scores = on_gpu(64, 4096, dtype=dtype)
    _, report = run_fused(function, scores, verify=True)
    assert report.counts["topk_mask"] == 1, report


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_benchmark_cases(case: benchmarking.Case) -> None:
    args: tuple[Any, ...] = case.make(torch.device("cuda"), torch.Generator("cuda").manual_seed(1))
    same(case.op(*args), reference(*args))
    same(plain(*args).contiguous(), reference(*args))
