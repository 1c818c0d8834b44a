"""`index_score` on a GPU: error against float64, masks, sizes, strides, CUDA graphs, compiled spellings.

    PYTHONPATH=. python -m pytest tests/gpu/test_index_score.py -q
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch

import fusion_passes
from fusion_passes import tuning
from fusion_passes.ops._index_score_cases import FLOAT8_BOUND
from fusion_passes.ops.index_score import OP, cases, index_score
from fusion_passes.testing import assert_same
from tests.patterns.index_score_spellings import SPELLINGS
from tests.patterns.test_index_score import ROUNDED
from tests.support.index_score import (
    E4,
    Arguments,
    draw,
    expected,
    expected_in_chunks,
    hidden,
    in_batch_order,
    launch,
    relative_error,
)
from tests.support.versions import not_on_2_11

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ("none", "keep", "drop", "add", "causal")
# bfloat16 and float16 are exact but for the sum, TF32 drops 13 bits.
BOUND = {BF16: 1e-6, F16: 1e-6, F32: 1e-6, E4: FLOAT8_BOUND}
# Inductor drops the rounding of float32 to bfloat16 and back that eager has.
ON_GPU = {"mixed_precision": 3e-2}
SIZES = [(1, 8192), (5, 300), (16, 1000), (64, 2048), (130, 1027)]


def check(args: Arguments, forced: str = "", inlined: bool = False, bound: float | None = None) -> None:
    with tuning.overriding(**({"index_score": forced} if forced else {})):
        found = launch(args, inlined=inlined)
    rounding = {BF16: 4e-3, F16: 5e-4}.get(args.dtype, 0.0)
    error = relative_error(found, expected(args))
    assert error <= (BOUND[args.q.dtype] if bound is None else bound) + rounding, error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32, E4])
@pytest.mark.parametrize("queries, keys", SIZES)
def test_dtypes_and_masks(kind: str, dtype: torch.dtype, queries: int, keys: int) -> None:
    mask = hidden(kind, 1, queries, keys, device="cuda")
    args = draw(1, queries, keys, 64, 128, dtype=dtype, device="cuda", scales="k" if dtype == E4 else "", **mask)
    check(args)
    check(args, inlined=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, tile", [(BF16, "keys=128"), (F16, "keys=64"), (F32, "keys=64"), (E4, "keys=128")])
@pytest.mark.parametrize("queries, heads, width", [(3, 64, 128), (64, 12, 96), (333, 64, 128), (1024, 8, 64)])
def test_a_product_per_head(queries: int, heads: int, width: int, dtype: torch.dtype, tile: str, kind: str) -> None:
    mask = hidden(kind, 2, queries, 1027, device="cuda")
    args = draw(2, queries, 1027, heads, width, dtype=dtype, device="cuda", scales="k" if dtype == E4 else "", **mask)
    for inlined in (False, True):
        check(args, f"{tile},queries=64,columns=0,warps=4,stages=2", inlined)


@pytest.mark.parametrize("heads, width", [(8, 64), (12, 64), (16, 128), (24, 96), (32, 128), (128, 128), (64, 256)])
@pytest.mark.parametrize("kind", ["none", "keep"])
def test_shapes(heads: int, width: int, kind: str) -> None:
    for batch, queries, keys in ((3, 37, 500), (2, 4, 129)):
        mask = hidden(kind, batch, queries, keys, device="cuda")
        check(draw(batch, queries, keys, heads, width, device="cuda", **mask))
        check(draw(batch, queries, keys, heads, width, device="cuda", dtype=F32, **mask), inlined=True)


@pytest.mark.parametrize("precision, bound", [("ieee", 1e-6), ("tf32x3", 1e-6), ("tf32", 2e-3)])
def test_precision_of_float32(precision: str, bound: float) -> None:
    check(draw(1, 40, 300, 64, 128, dtype=F32, device="cuda", precision=precision), bound=bound)


@pytest.mark.parametrize("scales", ["q", "k", "qk"])
@pytest.mark.parametrize("scale_after", [False, True])
def test_scales_of_either_sign(scales: str, scale_after: bool) -> None:
    for dtype in (E4, BF16):
        check(draw(2, 20, 300, 64, 128, dtype=dtype, device="cuda", scales=scales, scale_after=scale_after))


@pytest.mark.parametrize("layout", ["bst", "sbt", "bts", "tbs"])
def test_layouts_and_result_dtypes(layout: str) -> None:
    for dtype in (F32, BF16):
        check(draw(2, 33, 200, 16, 64, device="cuda", layout=layout, out=dtype))


def test_strides() -> None:
    base = draw(2, 50, 260, 16, 64, device="cuda", **hidden("keep", 2, 50, 260, device="cuda"))
    assert base.mask is not None
    changed: list[dict[str, Any]] = [
        {"q": torch.nn.functional.pad(base.q, (8, 8))[..., 8:72]},
        {"q": base.q.transpose(1, 2).contiguous().transpose(1, 2)},
        {"q": torch.nn.functional.pad(base.q, (3, 2))[..., 3:67]},
        {"k": base.k.transpose(0, 1).contiguous().transpose(0, 1)},
        {"k": base.k[:1].expand(2, -1, -1)},
        {"w": base.w.permute(2, 0, 1).contiguous().permute(1, 2, 0)},
        {"mask": base.mask.mT.contiguous().mT},
        {"mask": base.mask[:1, :1].expand(2, 50, 260)},
    ]
    for change in changed:
        for inlined in (False, True):
            check(dataclasses.replace(base, **change), inlined=inlined)


@pytest.mark.parametrize("keep_nan", [True, False])
def test_nan_and_infinity(keep_nan: bool) -> None:
    args = draw(1, 40, 300, 64, 128, device="cuda", keep_nan=keep_nan)
    args.q[0, 1, 2, 3] = args.k[0, 4, 5] = math.nan
    args.w[0, 3, 1] = math.inf
    check(args)
    masked = draw(1, 40, 300, 64, 128, device="cuda", keep_nan=keep_nan, **hidden("keep", 1, 40, 300, device="cuda"))
    assert masked.mask is not None
    masked.k[0, 33] = math.nan
    masked.mask[:, :, 33] = False
    check(masked)


def test_rows_and_blocks_that_see_nothing() -> None:
    for mask in (torch.zeros(1, 64, 2048, dtype=torch.bool), torch.full((1, 64, 2048), -math.inf)):
        kind = "keep" if mask.dtype == torch.bool else "add"
        check(draw(1, 64, 2048, 64, 128, device="cuda", mask_kind=kind, mask=mask.cuda()))
    for offset in (-100, -63, -1, 0, 1000, 5000):
        check(draw(1, 64, 2048, 64, 128, device="cuda", mask_kind="causal", causal_offset=offset))


def test_offsets_beyond_32_bits() -> None:
    """270,000 queries of 64 heads of 128 channels, and scores of 270,000 queries for 8,200 keys."""
    queries, keys = 270_000, 8_200
    q = torch.empty(1, queries, 64, 128, dtype=BF16, device="cuda").normal_()
    assert q.numel() > 2**31 and queries * keys > 2**31
    k = torch.randn(1, keys, 128, dtype=BF16, device="cuda")
    w = torch.randn(1, queries, 64, device="cuda")
    out = index_score(q, k, w, scale=0.3)
    for start in (0, 135_000, queries - 50):
        rows = slice(start, start + 50)
        assert relative_error(out[:, rows], expected(Arguments(q[:, rows], k, w[:, rows]))) < 1e-6


def test_the_same_bits_from_run_to_run() -> None:
    args = draw(1, 64, 8192, 64, 128, device="cuda", mask_kind="causal", causal_offset=8128).positional()
    first = OP(*args)
    assert all(torch.equal(OP(*args), first) for _ in range(50))


@pytest.mark.parametrize("queries", [1, 64])
def test_cuda_graphs(queries: int) -> None:
    args = draw(1, queries, 2048, 64, 128, device="cuda")
    OP(*args.positional())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OP(*args.positional())
    for seed in range(3):
        args.q.copy_(draw(1, queries, 2048, 64, 128, device="cuda", seed=seed).q)
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(out, expected(args)) < 1e-6


@pytest.mark.parametrize("kind", ["none", "add"])
def test_opcheck(kind: str) -> None:
    args = draw(2, 30, 200, 16, 64, device="cuda", **hidden(kind, 2, 30, 200, device="cuda"))
    assert set(torch.library.opcheck(OP, args.positional()).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_compile_to_one_launch(name: str) -> None:
    from torch._inductor.utils import run_and_get_code

    entry = SPELLINGS[name]
    untraced = {"unflatten", "arange"} & {*entry.function.__code__.co_names}
    not_on_2_11("does not trace this under a default device", bool(untraced))
    torch._dynamo.reset()
    inputs = [t.cuda() for t in entry.inputs()]
    with torch.no_grad(), torch.device("cuda"), fusion_passes.config.patch(strict=True, fusions="index_score"):
        compiled = torch.compile(entry.function, backend="fusion_passes", fullgraph=True)
        out, (code,) = run_and_get_code(compiled, *inputs)
        wanted = entry.function(*inputs)
    launches = re.findall(r"index_score\w*kernel\w*\.run\(", code)
    assert len(launches) == 1, fusion_passes.report()
    rounded = ON_GPU.get(name, ROUNDED.get(name, 1e-4))
    tolerance = max(rounded, FLOAT8_BOUND if any(t.dtype == E4 for t in inputs) else 0.0)
    assert_same(out, wanted, rtol=tolerance, atol=tolerance)


def selected(args: Arguments, k: int) -> torch.Tensor:
    """The keys that a plain spelling of the scores selects, compiled and fused."""

    def select(q: torch.Tensor, key: torch.Tensor, w: torch.Tensor, k_scale: torch.Tensor | None) -> torch.Tensor:
        products = q.float() @ key.float().mT.unsqueeze(1)
        products = products if k_scale is None else products * k_scale[:, None, None, :]
        scores = (products.relu() * w.unsqueeze(-1)).sum(2) * args.scale
        queries, keys = (torch.arange(n, device=q.device) for n in scores.shape[1:])
        hidden = keys > queries[:, None] + args.causal_offset
        return scores.masked_fill(hidden, -math.inf).topk(k).indices

    torch._dynamo.reset()
    before = fusion_passes.report().counts["index_score"]
    with torch.no_grad(), fusion_passes.config.patch(strict=True, fusions="index_score"):
        found = torch.compile(select, backend="fusion_passes", fullgraph=True)(args.q, args.k, args.w, args.k_scale)
    assert fusion_passes.report().counts["index_score"] == before + 1, fusion_passes.report()
    return found


@pytest.mark.parametrize("queries, keys, k", [(2048, 2048, 512), (2048, 4096, 2048)])
@pytest.mark.parametrize("dtype", [BF16, E4, F32])
def test_selected_sets_are_those_of_float64(dtype: torch.dtype, queries: int, keys: int, k: int) -> None:
    """Up to ties: a key that float64 would not select scores within rounding of the last one that it would.

    A sum of 128 products, and then of 64 heads, in float32 is off by their number times 2^-23 of the sum of absolute
    values at most. Of float8 products sm_90 keeps 13 bits below the largest.
    """
    args = draw(1, queries, keys, 64, 128, dtype=dtype, device="cuda", scales="k" if dtype == E4 else "",
                **hidden("causal", 1, queries, keys))  # fmt: skip
    exact = expected_in_chunks(args)
    indices = selected(args, k)
    assert bool((indices.sort(-1).values.diff(dim=-1) > 0).all()), "a key is selected twice"
    absolute = {name: getattr(args, name).abs() for name in ("k_scale",) if getattr(args, name) is not None}
    magnitude = expected_in_chunks(
        dataclasses.replace(args, q=args.q.float().abs(), k=args.k.float().abs(), w=args.w.abs(), fill=0.0, **absolute)
    )
    share = (128 + 64) * 2.0**-23 if dtype != E4 else 2.0**-13
    bound = 2 * share * magnitude.amax(-1, keepdim=True)
    last = exact.topk(k).values[..., -1:]
    chosen = exact.gather(-1, indices)
    assert bool((chosen >= last - bound).all()), float((last - bound - chosen).nan_to_num(0.0).max())
    visible = (torch.arange(queries, device="cuda") + args.causal_offset + 1).clamp(max=k)
    assert torch.equal((chosen > -math.inf).sum(-1)[0], visible)
    strangers = (chosen < last).sum() / chosen.isfinite().sum()
    assert float(strangers) <= (1e-2 if dtype == E4 else 1e-5), float(strangers)


@pytest.mark.parametrize("case", [c for c in cases() if c.bytes < 300 << 20], ids=lambda c: c.name)
def test_benchmark_cases(case: Any) -> None:
    args = case.make(torch.device("cuda"), torch.Generator("cuda").manual_seed(1))
    form = Arguments(*args)
    error = relative_error(in_batch_order(case.op(*args), form.layout), expected_in_chunks(form))
    assert error <= (FLOAT8_BOUND if form.q.dtype == E4 else 1e-6)
