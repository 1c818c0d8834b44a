"""`head_gate` on a GPU: against float64, programs that share a tile, CUDA graphs, streams, compiled models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import fusion_passes
from fusion_passes import benchmarking
from fusion_passes.ops.head_gate import OP, cases
from tests.patterns.head_gate_spellings import SPELLINGS
from tests.support.head_gate import BF16, F32, FORMS, bound, check, draw, error, expected, launch, special_values
from tests.support.versions import not_on_2_11

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TENSOR = "rows={},heads={},depth={},splits={},warps=4,stages=3,tensor=1"
CONFIGURATIONS = [
    "", TENSOR.format(16, 16, 128, 1), TENSOR.format(16, 16, 128, 28), TENSOR.format(16, 32, 64, 14),
    TENSOR.format(64, 64, 64, 1), TENSOR.format(64, 64, 64, 5), TENSOR.format(32, 64, 32, 7),
    "tensor=0,depth=1024,warps=4", "tensor=0,depth=2048,warps=8",
]  # fmt: skip


@pytest.mark.parametrize("forced", CONFIGURATIONS)
@pytest.mark.parametrize("form", ["rounded", "split_weight"])
def test_configurations(forced: str, form: str) -> None:
    for tokens in (1, 64, 300):
        check(draw(1, tokens, 64, 7168, form=form, device="cuda"), forced)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 16, 64, 300])
def test_forms(form: str, tokens: int) -> None:
    args = draw(1, tokens, 64, 7168, form=form, device="cuda")
    check(args)
    check(args, inlined=True)


@pytest.mark.parametrize("form", ["exact", "split_weight", "split_x", "float32"])
def test_error_is_that_of_float32(form: str) -> None:
    """Against float64 beside the float32 product of the graph."""
    for tokens in (1, 64, 2048, 8192):
        args = draw(1, tokens, 64, 7168, form=form, device="cuda", with_scale=False)
        stock = torch.nn.functional.linear(args.x.float(), args.weight.float()) * args.scale
        ours, theirs = error(OP(*args.positional()), args), error(stock, args)
        print(f"{form} T={tokens}: {ours:.2e}, stock {theirs:.2e}")
        assert ours <= 2 * theirs + 6e-8


@pytest.mark.parametrize("heads, columns", [(8, 256), (20, 1000), (33, 1537), (128, 6144), (64, 96)])
@pytest.mark.parametrize("batch, tokens", [(1, 1), (3, 37), (2, 512)])
def test_sizes(heads: int, columns: int, batch: int, tokens: int) -> None:
    for form in ("rounded", "split_weight"):
        for head_first in (False, True):
            args = draw(batch, tokens, heads, columns, form=form, device="cuda", head_first=head_first, dtype=BF16)
            check(args)
            check(dataclasses.replace(args, q_scale=None, dtype=F32), inlined=True)


@pytest.mark.parametrize("forced", ["", *CONFIGURATIONS[3:5], "tensor=0,depth=1024,warps=4"])
@pytest.mark.parametrize("form", ["rounded", "exact", "split_weight", "split_x"])
def test_infinities_and_nan(form: str, forced: str) -> None:
    args = special_values(draw(1, 20, 24, 512, form=form, with_scale=False, device="cuda"))
    found, wanted = launch(args, forced), expected(args)
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())
    assert torch.equal(found[wanted.isinf()], wanted[wanted.isinf()].float())


def test_strides() -> None:
    args = draw(2, 50, 24, 512, form="split_weight", device="cuda")
    time_first = args.x.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.nn.functional.pad(args.x, (8, 16))[..., 8:520]
    odd = torch.nn.functional.pad(args.x, (3, 2))[..., 3:515]
    for x in (time_first, padded, odd, args.x.mT.contiguous().mT):
        for weight in (args.weight, args.weight.mT.contiguous().mT):
            for forced in ("", CONFIGURATIONS[3], "tensor=0,depth=1024,warps=4"):
                check(dataclasses.replace(args, x=x, weight=weight), forced)


def test_offsets_beyond_32_bits() -> None:
    x = torch.empty(1, 300_100, 7168, dtype=BF16, device="cuda").normal_()
    weight = draw(1, 1, 64, 7168, device="cuda").weight
    out = OP(x, weight, None, 0.5, BF16, F32, False)
    for start in (0, 299_600, 300_000):
        rows = slice(start, start + 100)
        part = dataclasses.replace(draw(device="cuda"), x=x[:, rows], weight=weight, q_scale=None, scale=0.5)
        assert error(out[:, rows].contiguous(), part) <= bound(part)


@pytest.mark.parametrize("tokens", [16, 64, 2048])
def test_the_same_bits_from_run_to_run(tokens: int) -> None:
    args = draw(1, tokens, 64, 7168, form="split_weight", device="cuda").positional()
    first = OP(*args)
    assert all(torch.equal(OP(*args), first) for _ in range(200))


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_cuda_graphs(tokens: int) -> None:
    """Many launches behind one another, which reuse the scratch memory of those before, replayed again and again."""
    args = draw(1, tokens, 64, 7168, device="cuda")
    OP(*args.positional())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = []
        for _ in range(20):
            args.x.mul_(-1.0)
            results.append((OP(*args.positional()), args.x.clone()))
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    for out, held in results:
        part = dataclasses.replace(args, x=held)
        assert error(out, part) <= bound(part)


def test_streams_at_once() -> None:
    """Programs that wait do not keep those that they wait for from running."""
    sets = [draw(1, tokens, 64, 7168, device="cuda", seed=i) for i, tokens in enumerate((64, 16, 256, 64, 48, 2048))]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[] for _ in sets]
    for _ in range(100):
        for args, stream, found in zip(sets, streams, results):
            with torch.cuda.stream(stream):
                found.append(OP(*args.positional()))
    torch.cuda.synchronize()
    for args, found in zip(sets, results):
        assert error(found[0], args) <= bound(args) and all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("head_first", [False, True])
def test_opcheck(head_first: bool) -> None:
    args = draw(2, 30, 24, 512, device="cuda", head_first=head_first)
    assert set(torch.library.opcheck(OP, args.positional()).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_spellings_compile_to_one_launch(name: str, dynamic: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    not_on_2_11("traces lerp as a selection by a tensor", name == "sum_of_multiples")
    entry = SPELLINGS[name]
    case = entry.case
    if dynamic and name not in ("hugging_face", "serving_engine", "heads_first_with_scales", "einsum_of_rows"):
        pytest.skip("a symbolic number of tokens is tried on a few")
    torch._dynamo.reset()
    compiled = torch.compile(entry.function, backend="fusion_passes", fullgraph=True, dynamic=False)
    for tokens in (case.tokens, 50) if dynamic else (case.tokens,):
        inputs = [t.cuda() for t in case.inputs(tokens=tokens)]
        if dynamic:
            torch._dynamo.mark_dynamic(inputs[0], 0 if case.flat else 1)
            if "t" in case.q:
                torch._dynamo.mark_dynamic(inputs[2], case.q.index("t"))
        with torch.no_grad(), torch.device("cuda"), fusion_passes.config.patch(strict=True, fusions="head_gate"):
            out, codes = run_and_get_code(compiled, *inputs)
        wanted = case.meaning(tuple(inputs))
        wide = case.weights == F32 and case.dtype == F32
        assert float((out.double() - wanted).norm() / wanted.norm()) <= (2e-6 if wide else 5e-3)
        for code in codes:
            assert "head_gate" in code[code.index("def call(") :], fusion_passes.report()


@pytest.mark.parametrize("case", [c for c in cases() if c.bytes < 40 << 20], ids=lambda c: c.name)
def test_benchmark_cases(case: benchmarking.Case) -> None:
    args: tuple[Any, ...] = case.make(torch.device("cuda"), torch.Generator("cuda").manual_seed(1))
    assert case.plain is not None
    exact = case.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    errors = [
        float((found.double() - exact).norm() / exact.norm())
        for found in (case.op(*args), torch.compile(case.plain, dynamic=False)(*args))
    ]
    assert errors[0] <= 2 * errors[1] + 6e-8
