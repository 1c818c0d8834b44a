"""`mla_kv_pack` on a GPU: bytes against casts that saturate, offsets beyond 32 bits, CUDA graphs, compiled models."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

import fusion_passes
from fusion_passes import benchmarking, tuning
from fusion_passes.arch import of_device
from fusion_passes.ops.mla_kv_pack import KEY_OP, OP, cases, float8_reason
from tests.patterns.mla_kv_pack_cases import assert_same_bytes
from tests.patterns.mla_kv_pack_spellings import SPELLINGS
from tests.support.mla_kv_pack import DIVISORS, E4, E5, Arguments, draw, expected, launch, same_bytes
from tests.support.versions import not_on_2_11

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or float8_reason(of_device(torch.device("cuda"))) is not None,
    reason="needs a CUDA GPU that casts to float8",
)

CONFIGURATIONS = [
    "", "rows=1,warps=1,flat=0,pdl=0", "rows=4,warps=1,flat=0,pdl=1", "rows=8,warps=2,flat=0,pdl=0",
    "rows=16,warps=4,flat=1,pdl=0", "rows=16,warps=4,flat=1,pdl=1", "rows=32,warps=8,flat=1,pdl=0",
]  # fmt: skip


def check(args: Arguments, forced: str = "", inlined: bool = False) -> None:
    """Every byte, from outputs that start as NaN."""
    with tuning.overriding(**({"mla_kv_pack": forced} if forced else {})):
        found = launch(args, inlined=inlined)
    for actual, wanted in zip(found, expected(args), strict=True):
        assert same_bytes(actual, wanted)


@pytest.mark.parametrize("forced", CONFIGURATIONS)
@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("batch, tokens, heads", [(1, 1, 16), (1, 300, 16), (2, 37, 5), (1, 8, 128)])
def test_configurations(forced: str, layout: str, batch: int, tokens: int, heads: int) -> None:
    args = draw(batch, tokens, heads, device="cuda", k_layout=layout, v_layout=layout)
    check(args, forced)
    check(args, forced, inlined=True)


@pytest.mark.parametrize("nope, pe, value", [(192, 64, 256), (96, 40, 72), (128, 64, 0), (8, 8, 8), (512, 64, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widths_and_dtypes(nope: int, pe: int, value: int, dtype: torch.dtype) -> None:
    for k_dtype, v_dtype in ((E4, E5), (E5, E4)):
        form: dict[str, Any] = {"k_dtype": k_dtype, "v_dtype": v_dtype, "pe_first": nope == 192}
        check(draw(1, 70, 6, nope, pe, value, dtype=dtype, device="cuda", **form))


@pytest.mark.parametrize("steps", ["*s", "/s", "*1/s", "*0.3", "*s clamp(-20.0,30.0)", "clamp(-1.5,1e9) /s *-4.0"])
@pytest.mark.parametrize("scale", [2.7, 0.013, 448.0, -3.0])
def test_steps(steps: str, scale: float) -> None:
    tensor = torch.tensor(scale, device="cuda") if "s" in steps.split("clamp")[0] else None
    if steps.endswith("-4.0"):
        tensor = torch.tensor(scale, device="cuda")
    form: dict[str, Any] = {"k_steps": steps, "v_steps": steps, "k_scale": tensor, "v_scale": tensor}
    check(draw(1, 300, 16, device="cuda", **form))


@pytest.mark.parametrize("scale", DIVISORS)
def test_quotients_of_every_bfloat16_number(scale: float) -> None:
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(1, 64, 4, 256).cuda()
    divisor = torch.tensor(scale, device="cuda")
    form: dict[str, Any] = {"k_steps": "/s", "v_steps": "/s", "k_scale": divisor, "v_scale": divisor, "v_dtype": E5}
    check(Arguments(numbers[..., :128], numbers[:, :, 0, :8].contiguous(), numbers[..., 128:], **form))


def test_every_bfloat16_number_saturates() -> None:
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(1, 64, 4, 256).cuda()
    for dtype in (E4, E5):
        form: dict[str, Any] = {"k_dtype": dtype, "v_dtype": dtype}
        check(Arguments(numbers[..., :128], numbers[:, :, 0, :64].contiguous(), numbers[..., 128:], **form))


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
def test_offsets_beyond_32_bits(layout: str) -> None:
    """65,537 tokens of 128 heads: the input's offsets pass 2^31 elements, with 90,000 the key's do too."""
    for tokens in (65537, 90000):
        kv = torch.empty(1, tokens, 128, 256, dtype=torch.bfloat16, device="cuda").normal_()
        k_pe = torch.empty(1, tokens, 64, dtype=torch.bfloat16, device="cuda").normal_()
        form = ("", E4, layout, False, "", E4, layout)
        key, value = OP(kv[..., :128], k_pe, kv[..., 128:], None, None, *form)
        for start in (0, tokens // 2, tokens - 65):
            rows = slice(start, start + 65)
            part = Arguments(kv[:, rows, :, :128], k_pe[:, rows], kv[:, rows, :, 128:])
            found = [t.transpose(1, 2) if layout == "bhtd" else t for t in (key, value)]
            for actual, wanted in zip(found, expected(part)):
                assert same_bytes(actual[:, rows].contiguous(), wanted)
        del kv, key, value


def test_strides() -> None:
    kv = torch.randn(2, 50, 3, 96, device="cuda").bfloat16()
    pe = torch.randn(50, 2, 40, device="cuda").bfloat16()[..., 16:24].transpose(0, 1)
    for source in (kv, kv.transpose(1, 2).contiguous().transpose(1, 2), kv[..., 4:]):
        for forced in CONFIGURATIONS:
            check(Arguments(source[..., :32], pe, source[..., 40:72]), forced)


def test_uncast_key() -> None:
    check(draw(2, 300, 16, value=0, device="cuda", k_dtype=torch.bfloat16, k_layout="bhtd"))


@pytest.mark.parametrize("value", [0, 128])
def test_opcheck(value: int) -> None:
    args = draw(2, 30, 4, 128, 64, value, device="cuda", special=False)
    assert set(torch.library.opcheck(OP if value else KEY_OP, args.positional()).values()) == {"SUCCESS"}


def test_empty_input() -> None:
    args = draw(1, 1, 16, device="cuda")
    assert args.v is not None
    args = dataclasses.replace(args, k_nope=args.k_nope[:, :0], k_pe=args.k_pe[:, :0], v=args.v[:, :0])
    key, value = OP(*args.positional())
    assert key.shape == (1, 0, 16, 192) and value.shape == (1, 0, 16, 128)


@pytest.mark.parametrize("tokens", [1, 8, 4096])
def test_cuda_graph_with_dependent_launches(tokens: int) -> None:
    """Launches that may start early, one behind the other, and behind the kernel that writes their input."""
    args = draw(1, tokens, 16, device="cuda", special=False)
    source = args.k_nope._base
    assert source is not None
    graph = torch.cuda.CUDAGraph()
    OP(*args.positional())
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = []
        for _ in range(20):
            source.mul_(-1.5).clamp_(-100, 100)
            results.append((OP(*args.positional()), source.clone()))
    graph.replay()
    torch.cuda.synchronize()
    for (key, value), held in results:
        wanted = expected(dataclasses.replace(args, k_nope=held[..., :128], v=held[..., 128:]))
        assert same_bytes(key, wanted[0]) and same_bytes(value, wanted[1])


def _on_gpu(t: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides of zero, which `cuda()` alone would fill in."""
    single = t[tuple(slice(0, 1 if step == 0 else None) for step in t.stride())]
    return single.cuda().expand(t.shape)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_spellings_compile_to_one_launch(name: str, dynamic: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    entry = SPELLINGS[name]
    not_on_2_11("traces no unflatten under a default device", "unflatten" in entry.function.__code__.co_names)
    compiled = torch.compile(entry.function, backend="fusion_passes", fullgraph=True, dynamic=False)
    for tokens in (6, 50) if dynamic else (6,):
        inputs = entry.case.inputs(tokens=tokens)
        # Sums of the projection in another order than on the CPU make neighbouring numbers of float8.
        wanted = entry.case.meaning(inputs)
        on_gpu = [_on_gpu(t) for t in inputs]
        if dynamic and not entry.case.apart:
            for tensor in (on_gpu[0], on_gpu[2]):
                torch._dynamo.mark_dynamic(tensor, 0 if entry.case.batch is None else tensor.shape.index(tokens))
        with torch.no_grad(), torch.device("cuda"), fusion_passes.config.patch(strict=True, fusions="mla_kv_pack"):
            out, codes = run_and_get_code(compiled, *on_gpu)
        results = [out] if isinstance(out, torch.Tensor) else out
        assert_same_bytes([t.cpu() for t in results], wanted, loose=True)
        for code in codes:
            body = code[code.index("def call(") :]
            # Few tokens' projection is a kernel of Inductor's own.
            launched = [name for name in re.findall(r"(\w+)\.run\(", body) if "_mm_" not in name]
            assert launched == ["mla_kv_pack_kernel_0"], fusion_passes.report()


@pytest.mark.parametrize("case", [c for c in cases() if c.bytes < 30 << 20], ids=lambda c: c.name)
def test_benchmark_cases(case: benchmarking.Case) -> None:
    args = case.make(torch.device("cuda"), torch.Generator("cuda").manual_seed(1))
    assert case.plain is not None
    compiled = torch.compile(case.plain, dynamic=False)
    for actual, stock in zip(case.op(*args), compiled(*args)):
        assert same_bytes(actual, stock)
