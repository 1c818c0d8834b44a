"""`delta_rule_intra` on a GPU: errors against float64, every configuration, strong decays, CUDA graphs, compiled."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from fusion_passes import benchmarking, tuning
from fusion_passes.ops._delta_rule_intra_cases import cases
from fusion_passes.ops.delta_rule_intra import OP, reference
from fusion_passes.testing import run_fused
from tests.gpu.captured import assert_compiled_and_captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BOTH = pytest.mark.parametrize("per_channel", [False, True])
# bfloat16: with a decay per channel one rounding of the factors of k k^T; float32 takes three products of tf32.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 2e-5, torch.float32: 2e-5}
FORM = {"scale": 0.1, "norm_eps": 1e-6, "results": "u,w", "columns": False, "chunks_first": False,
        "out_dtype": torch.float32}  # fmt: skip


def arguments(
    tokens: int = 300, key_heads: int = 2, heads: int = 4, key: int = 128, value: int = 128, chunk: int = 64, *,
    batch: int = 1, per_channel: bool = False, dtype: torch.dtype = torch.bfloat16, decay: float = 0.2,
    pairs: bool = True, **changes: Any,
) -> tuple[Any, ...]:  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    sums = -decay * draw(batch, heads, -(-tokens // chunk), chunk, *((key,) if per_channel else ())).abs()
    values = {
        "k": draw(batch, tokens, key_heads, key).to(dtype), "v": draw(batch, tokens, heads, value).to(dtype),
        "sums": sums.cumsum(3), "beta": draw(batch, tokens, heads).sigmoid().to(dtype),
        "q": draw(batch, tokens, key_heads, key).to(dtype) if pairs else None, **FORM,
    }  # fmt: skip
    return tuple({**values, **changes}.values())


def check(args: tuple[Any, ...], launch: str = "", *, tolerance: float | None = None) -> None:
    with tuning.overriding(**({"delta_rule_intra": launch} if launch else {})):
        found = OP(*args)
    wide: list[Any] = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    allowed = TOLERANCE[args[0].dtype] if tolerance is None else tolerance
    for name, a, b in zip(("u", "w", "pairs"), found, reference(*wide)):
        assert a.shape == b.shape
        error = benchmarking.relative_error(a, b) if b.numel() else 0.0
        assert error <= allowed, f"{name}: {error:.1e}"


@BOTH
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens, chunk", [*itertools.product([1, 64, 300], [16, 64]), (100, 32)])
def test_dtypes_chunks_and_tails(tokens: int, chunk: int, dtype: torch.dtype, per_channel: bool) -> None:
    check(arguments(tokens, chunk=chunk, batch=2, dtype=dtype, per_channel=per_channel))


@BOTH
@pytest.mark.parametrize("key, value", [(64, 128), (128, 64), (256, 256), (16, 48), (64, 96), (192, 32), (96, 240)])
def test_widths(key: int, value: int, per_channel: bool) -> None:
    check(arguments(130, 1, 2, key, value, per_channel=per_channel))


@BOTH
@pytest.mark.parametrize(
    "results, columns, chunks_first", [("uw", True, True), ("wu", False, True), ("u,w", True, False)]
)
def test_memory_orders(results: str, columns: bool, chunks_first: bool, per_channel: bool) -> None:
    form: dict[str, Any] = {"results": results, "columns": columns, "chunks_first": chunks_first}
    check(arguments(per_channel=per_channel, **form))


@BOTH
@pytest.mark.parametrize("launch", ["warps=8", "key_block=128", "value_block=128"])
@pytest.mark.parametrize("tokens", [1, 640])
def test_configurations(tokens: int, launch: str, per_channel: bool) -> None:
    check(arguments(tokens, per_channel=per_channel), launch)


@BOTH
@pytest.mark.parametrize("decay", [0.0, 0.01, 1.0, 5.0, 30.0, 300.0])
def test_decays_of_every_strength(decay: float, per_channel: bool) -> None:
    check(arguments(decay=decay, per_channel=per_channel))
    check(arguments(decay=decay, per_channel=per_channel, dtype=torch.float32), tolerance=5e-5)


@BOTH
def test_decay_to_nothing_and_no_write(per_channel: bool) -> None:
    args = arguments(per_channel=per_channel)
    args[2][:, 0, :, 20:] = -math.inf
    args[2][:, 1, :, 5:] = args[2][:, 1, :, 4:5]
    args[3][:, 140:160] = 0.0
    check(args)


@BOTH
def test_nearly_equal_keys(per_channel: bool) -> None:
    """The triangular system at its worst: all keys alike, hardly any decay."""
    args = list(arguments(1024, 2, 2, per_channel=per_channel, decay=1e-4))
    args[0] = (args[0][:, :1] + 0.05 * args[0].float()).bfloat16()
    check(tuple(args), tolerance=4e-2)


@BOTH
def test_rows_past_two_to_the_31(per_channel: bool) -> None:
    """64-bit row offsets: k, v and q are windows of rows that span more than 2^31 elements."""
    args = list(arguments(640, 1, 1, per_channel=per_channel))
    wide = torch.empty(640, 1 << 22, dtype=torch.bfloat16, device="cuda")
    for place, index in enumerate((0, 1, 4)):
        window = wide[:, 128 * place : 128 * (place + 1)]
        args[index] = window.copy_(args[index][0, :, 0])[None, :, None]
    check(tuple(args))


@pytest.mark.parametrize("case", [case for case in cases() if case.plain], ids=lambda case: case.name)
def test_benchmarked_shapes(case: Any) -> None:
    args = case.make(torch.device("cuda"), torch.Generator("cuda").manual_seed(0))
    exact = benchmarking.exact_result(case, args)
    assert benchmarking.relative_error(case.op(*args), exact) <= case.bound
    for make in case.peers.values():
        try:
            peer = make()
        except ImportError:
            continue
        assert benchmarking.relative_error(peer(*args), exact) <= 2 * case.bound


@pytest.mark.parametrize("name", ["KDA 8/8x128 T=4096", "GDN 4/8x128 T=4096"])
def test_the_spelling_of_models_compiles_to_the_op(name: str) -> None:
    (case,) = [case for case in cases() if case.name == name]
    args = case.make(torch.device("cuda"), torch.Generator("cuda").manual_seed(0))
    assert case.plain is not None and case.bound is not None
    found, report = run_fused(case.plain, *args)
    assert report.counts.get("delta_rule_intra") == 1, str(report)
    assert benchmarking.relative_error(found, benchmarking.exact_result(case, args)) <= case.bound


@BOTH
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_and_captured(dynamic: bool, per_channel: bool) -> None:
    assert_compiled_and_captured(OP, (arguments(tokens, per_channel=per_channel) for tokens in (320, 128)), dynamic)


def test_schema() -> None:
    torch.library.opcheck(OP, arguments(70, 1, 2), test_utils=("test_schema", "test_faketensor"))
