"""`qkv_split` on a GPU: bit equality at every layout and size, opcheck, CUDA graphs, inlined in torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fusion_passes
from fusion_passes import benchmarking, tuning
from fusion_passes.lowering import inlining
from fusion_passes.ops.qkv_split import OP, cases, plain, qkv_split
from tests.support.qkv_split import expected, launch, same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CONFIGURATIONS = [
    "",
    "rows=1,lanes=8,warps=1",
    "rows=32,lanes=32,warps=2",
    "rows=64,lanes=64,warps=4",
    "rows=64,lanes=128,warps=8",
    "rows=128,lanes=64,warps=8",
]

# How [B, T, D] may lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "time_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "wide_rows": lambda x: torch.nn.functional.pad(x, (8, 16))[..., 8 : x.shape[2] + 8],
    "odd_rows": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3 : x.shape[2] + 3],
    "padded_time": lambda x: torch.nn.functional.pad(x.mT.contiguous(), (0, 3))[..., : x.shape[1]].mT,
    "later_time": lambda x: torch.nn.functional.pad(x.mT.contiguous(), (8, 8))[..., 8 : x.shape[1] + 8].mT,
    "every_other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def bits(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random bit patterns, NaN among them."""
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    info = torch.iinfo(integer)
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = torch.randint(info.min, info.max, shape, generator=generator, device="cuda", dtype=integer)
    return drawn.view(dtype)


def check(
    x: Tensor, heads: Sequence[int], dims: Sequence[int], repeats: Sequence[int] | None = None,
    head_major: bool = False, forced: str = "",
) -> None:  # fmt: skip
    args: tuple[Any, ...] = (x, list(heads), list(dims), list(repeats or [1] * len(heads)), head_major)
    with tuning.overriding(**({"qkv_split": forced} if forced else {})):
        same_bits(launch(args), expected(*args))
        same_bits(OP(*args), expected(*args))


@pytest.mark.parametrize("forced", CONFIGURATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_major", [False, True])
def test_layouts_and_configurations(layout: str, forced: str, head_major: bool) -> None:
    for tokens in (1, 7, 64, 200, 333):
        check(LAYOUTS[layout](bits(2, tokens, 512)), [1, 1, 2], [128] * 3, head_major=head_major, forced=forced)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes(layout: str, dtype: torch.dtype) -> None:
    check(LAYOUTS[layout](bits(1, 130, 384, dtype=dtype)), [2, 1], [128, 128])


@pytest.mark.parametrize("layout", ["rows", "transposed", "padded_time"])
@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize(
    "heads, dims, repeats",
    [
        ([16, 16, 48], [128] * 3, [1, 1, 1]),
        ([5, 5, 5], [96, 96, 192], [1, 1, 1]),
        ([3, 1], [24, 8], [1, 1]),
        ([8, 2, 2], [64] * 3, [1, 4, 4]),
        ([1] * 13, [8] * 13, [1] * 13),
    ],
)
def test_widths_and_repeats(
    layout: str, head_major: bool, heads: list[int], dims: list[int], repeats: list[int]
) -> None:
    width = sum(h * k for h, k in zip(heads, dims))
    check(LAYOUTS[layout](bits(2, 75, width)), heads, dims, repeats, head_major)


@pytest.mark.parametrize("layout", ["rows", "transposed", "padded_time"])
@pytest.mark.parametrize("head_major", [False, True])
def test_offsets_beyond_32_bits(layout: str, head_major: bool) -> None:
    """The last tokens of 2.2 billion elements, against the same tokens alone."""
    tokens, columns = 2**31 // 2048 + 24_000, 2048
    memory = torch.empty(columns * (tokens + 3), dtype=torch.bfloat16, device="cuda")
    if layout == "rows":
        x = memory[: columns * tokens].view(1, tokens, columns)
    else:
        pitch = tokens + (3 if layout == "padded_time" else 0)
        x = memory[: columns * pitch].view(1, columns, pitch)[..., :tokens].mT
    x[:, -500:].copy_(bits(1, 500, columns))
    x[:, :500].copy_(bits(1, 500, columns))
    form = ([4, 4, 8], [128] * 3, [1] * 3, head_major)
    outs = OP(x, *form)
    for part in (slice(-500, None), slice(0, 500)):
        wanted = expected(x[:, part], *form)
        kept = [(out[:, :, part] if head_major else out[:, part]).contiguous() for out in outs]
        same_bits(kept, wanted)


@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_opcheck(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 40, 512, device="cuda").bfloat16())
    for head_major in (False, True):
        args = (x, [1, 1, 2], [128] * 3, [1, 2, 1], head_major)
        assert set(torch.library.opcheck(OP, args).values()) == {"SUCCESS"}


def test_empty() -> None:
    assert [o.shape[1] for o in qkv_split(bits(1, 0, 512), [1, 1, 2], 128)] == [0, 0, 0]


def test_cuda_graph() -> None:
    x = torch.randn(1, 512, 2048, device="cuda").bfloat16()
    qkv_split(x, [4, 4, 8], 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = qkv_split(x, [4, 4, 8], 128)
    x.mul_(0.5)
    graph.replay()
    same_bits(outs, qkv_split(x, [4, 4, 8], 128))


def test_one_binary_for_every_number_of_tokens() -> None:
    """A prompt of another length must not compile a kernel."""
    from fusion_passes.ops._qkv_split_kernel import qkv_split_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for cache in qkv_split_kernel.device_caches.values())

    for strided in (False, True):
        counts = set()
        for tokens in (512, 520, 601, 640, 777):
            x = bits(1, 2048, tokens).mT if strided else bits(1, tokens, 2048)
            check(x, [4, 4, 8], [128] * 3, forced="rows=32,lanes=64,warps=4")
            counts.add(compiled())
        assert len(counts) == 1, counts


def layer(x: Tensor, weight: Tensor) -> list[Tensor]:
    return plain((x @ weight), [4, 4, 8], [128] * 3, [1] * 3, False)


def convolved(x: Tensor, weight: Tensor) -> list[Tensor]:
    """x is [B, D, T], as a convolution takes it."""
    mixed = torch.nn.functional.conv1d(x, weight, groups=2048, padding=3)[..., : x.shape[2]]
    return plain(mixed.mT, [4, 4, 8], [128] * 3, [1] * 3, False)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [layer, convolved])
def test_fused_and_inlined_in_compile(function: Callable[..., Any], dynamic: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    weight = torch.randn(256, 2048, device="cuda").bfloat16()
    if function is convolved:
        weight = torch.randn(2048, 1, 4, device="cuda").bfloat16()
    before = fusion_passes.report().counts["qkv_split"]
    compiled = torch.compile(function, backend="fusion_passes", dynamic=None, fullgraph=True)
    for tokens in (256, 301, 512):
        shape = (1, tokens, 256) if function is layer else (1, 2048, tokens)
        x = torch.randn(shape, device="cuda").bfloat16()
        if dynamic:
            torch._dynamo.mark_dynamic(x, shape.index(tokens))
        with torch.no_grad():
            outs, codes = run_and_get_code(compiled, x, weight)
            wanted = torch.compile(function, dynamic=False, fullgraph=True)(x, weight)
        same_bits(outs, wanted)
        for code in codes:
            body = code[code.index("def call(") :]
            assert body.count("qkv_split_kernel_0.run(") == 1 and "torch.ops.fusion_passes" not in body
            assert function is convolved or "triton_poi" not in body
    assert fusion_passes.report().counts["qkv_split"] > before


def test_opaque_call_agrees() -> None:
    x = torch.randn(1, 300, 2048, device="cuda").bfloat16()
    args = ([4, 4, 8], [128] * 3, [1] * 3, True)
    inlined = torch.compile(lambda t: OP(t, *args), fullgraph=True)(x)
    torch._dynamo.reset()
    with inlining(False):
        opaque = torch.compile(lambda t: OP(t, *args), fullgraph=True)(x)
    same_bits(inlined, OP(x, *args))
    same_bits(opaque, OP(x, *args))


@pytest.mark.parametrize("case", [c for c in cases() if c.bytes < 600e6], ids=lambda c: c.name)
def test_benchmark_cases(case: benchmarking.Case) -> None:
    args = case.make(torch.device("cuda"), torch.Generator("cuda").manual_seed(1))
    same_bits(case.op(*args), expected(*args))
