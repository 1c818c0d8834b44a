"""`gate_cumsum` on a GPU: values against float64, opcheck, CUDA graphs, inlined in torch.compile."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from fusion_passes import benchmarking, tuning
from fusion_passes.lowering import inlining
from fusion_passes.ops.gate_cumsum import OP, cases, gate_cumsum, reference
from tests.support.gate_cumsum import launch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CONFIGURATIONS = [
    "",
    "rows=1,lanes=32,warps=1,serial=1",
    "rows=16,lanes=128,warps=4,serial=1",
    "rows=8,lanes=64,warps=2,serial=1",
    "rows=16,lanes=32,warps=1,serial=0",
    "rows=32,lanes=32,warps=4,serial=0",
]


def arguments(
    tokens: int = 300, heads: tuple[int, int] = (1, 4), channels: int = 128, *, batch: int = 2,
    dtype: torch.dtype = torch.bfloat16, layout: str = "bhnck", chunk: int = 64, **changes: Any,
) -> tuple[Any, ...]:  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    raw = draw(batch, tokens, *heads, channels).mul_(6).to(dtype)
    a_log = draw(*heads, 1).sigmoid_().mul_(16).log_().expand(*heads, channels)
    values = {
        "raw": raw, "a_log": a_log, "bias": draw(*heads, channels), "chunks": -(-tokens // chunk), "chunk_size": chunk,
        "lower_bound": None, "scale": 1.0, "beta": 1.0, "threshold": 20.0, "pad_gate": False, "layout": layout,
        "cu_seqlens": None, "chunk_indices": None,
    }  # fmt: skip
    return tuple({**values, **changes}.values())


def exact(args: tuple[Any, ...]) -> torch.Tensor:
    wide: list[Any] = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    return reference(*wide)


def check(args: tuple[Any, ...], forced: str = "") -> None:
    """Every element within 4e-6 of float64, from an output that starts as NaN."""
    with tuning.overriding(**({"gate_cumsum": forced} if forced else {})):
        out = launch(args)
    torch.testing.assert_close(out.double(), exact(args), rtol=4e-6, atol=1e-8, equal_nan=True)


def forced_for(forced: str, channels: int, heads: int) -> str:
    """A configuration with lanes that the shape has."""
    total = channels if channels > 1 else heads
    return ",".join(
        f"lanes={min(int(item[6:]), 1 << (total - 1).bit_length())}" if item.startswith("lanes=") else item
        for item in forced.split(",")
    )


@pytest.mark.parametrize("forced", CONFIGURATIONS)
@pytest.mark.parametrize("channels", [1, 96, 128])
@pytest.mark.parametrize("layout", ["bhnck", "bnchk"])
def test_configurations(forced: str, channels: int, layout: str) -> None:
    check(arguments(channels=channels, layout=layout), forced and forced_for(forced, channels, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("pad_gate", [False, True])
def test_dtypes_and_forms(dtype: torch.dtype, lower_bound: float | None, pad_gate: bool) -> None:
    check(arguments(dtype=dtype, lower_bound=lower_bound, pad_gate=pad_gate, chunks=6, scale=1 / math.log(2)))


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 4096])
@pytest.mark.parametrize("chunk", [16, 128])
def test_lengths(tokens: int, chunk: int) -> None:
    check(arguments(tokens, chunk=chunk))


def test_layouts() -> None:
    for order in itertools.islice(itertools.permutations("bnchk"), 0, None, 13):
        check(arguments(130, (2, 3), 32, layout="".join(order)))


def test_views() -> None:
    args = list(arguments(200, (2, 3), 64))
    wide = torch.randn(2, 200, 2, 5, 70, device="cuda").bfloat16()
    for raw in (wide[:, :, :, 1:4, 3:67], args[0].permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)):
        check((raw, *args[1:]))


@pytest.mark.parametrize("channels", [1, 128])
@pytest.mark.parametrize("lengths", [[1000], [1, 0, 64, 65, 0, 300, 1], [1] * 300])
def test_packed_sequences(lengths: list[int], channels: int) -> None:
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    chunks = [(s, c) for s, n in enumerate(lengths) for c in range(-(-n // 64))]
    for indices in (None, torch.tensor(chunks, dtype=torch.int32, device="cuda")):
        check(arguments(sum(lengths), channels=channels, batch=1, layout="bnchk", chunks=1, cu_seqlens=bounds,
                        chunk_indices=indices))  # fmt: skip


def test_gate_is_accurate_to_a_millionth() -> None:
    z = torch.linspace(-20, 30, 1 << 20, device="cuda").view(1, -1, 1, 1, 128)
    zero = torch.zeros(1, 1, 128, device="cuda")
    for lower_bound in (None, -5.0):
        args = (z, zero, None, z.shape[1] // 16, 16, lower_bound, 1.0, 1.0, 20.0, False, "bnchk", None, None)
        first, wanted = launch(args)[:, :, 0].double(), exact(args)[:, :, 0]
        assert ((first - wanted) / wanted).abs().max() < 1.3e-6


def test_infinite_and_nan_inputs() -> None:
    args = arguments(64, channels=8, dtype=torch.float32)
    special = torch.tensor([-math.inf, math.inf, math.nan, 1e4, -1e4, 88.0, -88.0, 0.0], device="cuda")
    args[0][0, 3, 0, 0] = special
    check(args)
    check((*args[:5], -5.0, *args[6:]))


def test_offsets_beyond_32_bits() -> None:
    tokens = 2**31 // (32 * 128) + 130
    raw = torch.zeros(1, tokens, 1, 32, 128, dtype=torch.bfloat16, device="cuda")
    raw[:, -130:] = torch.randn(1, 130, 1, 32, 128, device="cuda")
    a_log = torch.zeros(1, 32, 128, device="cuda")
    form = (64, None, 1.0, 1.0, 20.0, False, "bnchk", None, None)
    start = (tokens - 130) // 64 * 64
    with tuning.overriding(gate_cumsum="rows=8,lanes=128,warps=8"):  # the same order of sums
        out = OP(raw, a_log, None, -(-tokens // 64), *form)
        rest = OP(raw[:, start:], a_log, None, -(-(tokens - start) // 64), *form)
    assert torch.equal(out[:, start // 64 :], rest)


@pytest.mark.parametrize("layout", ["bhnck", "bnchk"])
def test_opcheck(layout: str) -> None:
    assert set(torch.library.opcheck(OP, arguments(layout=layout)).values()) == {"SUCCESS"}


def test_cuda_graph() -> None:
    args = arguments(512)
    graph = benchmarking.capture(OP, [args])
    eager = OP(*args)
    static = torch.cuda.CUDAGraph()
    with torch.cuda.graph(static):
        out = OP(*args)
    args[0].mul_(0.5)
    static.replay()
    graph.replay()
    assert torch.equal(out, OP(*args)) and not torch.equal(out, eager)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inlined_in_compile(dynamic: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    def layer(x: torch.Tensor, weight: torch.Tensor, a_log: torch.Tensor) -> torch.Tensor:
        raw = (x @ weight).view(1, -1, 2, 4, 64)[:, :, 1]
        return gate_cumsum(raw, a_log, head_first=True).exp()

    weight, a_log = torch.randn(256, 512, device="cuda").bfloat16(), torch.randn(4, device="cuda")
    compiled = torch.compile(layer, dynamic=dynamic, fullgraph=True)
    for tokens in (512, 700):
        x = torch.randn(1, tokens, 256, device="cuda").bfloat16()
        with torch.no_grad():
            out, codes = run_and_get_code(compiled, x, weight, a_log)
            torch.testing.assert_close(out, layer(x, weight, a_log), rtol=2e-2, atol=1e-6)
        for code in codes:
            body = code[code.index("def call(") :]
            assert "gate_cumsum_kernel_0.run(" in body and "torch.ops.fusion_passes" not in body


def test_opaque_call_agrees() -> None:
    args = arguments(512)
    compiled = torch.compile(lambda *a: OP(*a) * 2, fullgraph=True)
    with torch.no_grad():
        inlined = compiled(*args)
        torch._dynamo.reset()
        with inlining(False):
            opaque = torch.compile(lambda *a: OP(*a) * 2, fullgraph=True)(*args)
    assert torch.equal(inlined, opaque) and torch.equal(inlined, OP(*args) * 2)


@pytest.mark.parametrize("case", [c for c in cases() if c.bytes < 30 << 20], ids=lambda c: c.name)
def test_benchmark_cases(case: benchmarking.Case) -> None:
    args = case.make(torch.device("cuda"), torch.Generator("cuda").manual_seed(1))
    assert benchmarking.relative_error(case.op(*args), benchmarking.exact_result(case, args)) < 2e-7
