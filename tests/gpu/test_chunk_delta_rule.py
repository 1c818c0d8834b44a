"""`chunk_delta_rule` on a GPU: errors against float64, every configuration, strong decays, CUDA graphs, compiled."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from fusion_passes import benchmarking, tuning
from fusion_passes.ops._chunk_delta_rule_cases import cases
from fusion_passes.ops.chunk_delta_rule import OP, reference
from tests.gpu.captured import assert_compiled_and_captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BOTH = pytest.mark.parametrize("per_channel", [False, True])
# float16 has the mantissa of tf32, of which one product is taken; float32 takes three.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 2e-5}


def arguments(
    tokens: int = 300, key_heads: int = 2, heads: int = 4, key: int = 128, value: int = 128, *, batch: int = 1,
    per_channel: bool = False, dtype: torch.dtype = torch.bfloat16, decay: float = 0.2, seed: int = 0, **changes: Any,
) -> tuple[Any, ...]:  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(seed + tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    gates = (batch, tokens, heads, key) if per_channel else (batch, tokens, heads)
    values = {
        "q": draw(batch, tokens, key_heads, key).to(dtype), "k": draw(batch, tokens, key_heads, key).to(dtype),
        "v": draw(batch, tokens, heads, value).to(dtype), "g": -decay * draw(*gates).abs(),
        "beta": draw(batch, tokens, heads).sigmoid().to(dtype), "a_log": None, "dt_bias": None, "initial_state": None,
        "cu_seqlens": None, "scale": key**-0.5, "norm_eps": 1e-6, "gate": "log", "lower_bound": -5.0,
        "beta_sigmoid": None, "out_dtype": dtype, "output_final_state": True,
    }  # fmt: skip
    return tuple({**values, **changes}.values())


def exact(args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    wide: list[Any] = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    return reference(*wide)


def check(args: tuple[Any, ...], launch: str = "", *, tolerance: float | None = None) -> None:
    with tuning.overriding(**({"chunk_delta_rule": launch} if launch else {})):
        found = OP(*args)
    allowed = TOLERANCE[args[0].dtype] if tolerance is None else tolerance
    for name, a, b in zip(("o", "final_state"), found, exact(args)):
        error = benchmarking.relative_error(a, b)
        assert error <= allowed, f"{name}: {error:.1e}"


@BOTH
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_dtypes_and_tails(tokens: int, dtype: torch.dtype, per_channel: bool) -> None:
    state = torch.randn(2, 4, 128, 128, device="cuda")
    check(arguments(tokens, batch=2, dtype=dtype, per_channel=per_channel, initial_state=state))


@BOTH
@pytest.mark.parametrize("key, value", [*itertools.product([64, 96, 128, 256], [64, 96, 192, 256])])
def test_widths(key: int, value: int, per_channel: bool) -> None:
    check(arguments(130, 1, 2, key, value, per_channel=per_channel))


@BOTH
@pytest.mark.parametrize("launch", ["columns=16", "columns=32,stages=1", "columns=32,stages=2", "columns=32,stages=3",
                                    "columns=64,stages=2", "scan_warps=8", "prologue_warps=8", "segments=2",
                                    "segments=8,columns=64,stages=2"])  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 65, 640])
def test_configurations(tokens: int, launch: str, per_channel: bool) -> None:
    if "stages=1" in launch and not per_channel:
        with pytest.raises(ValueError, match="stages must be at least 2"):
            check(arguments(tokens), launch)
        return
    check(arguments(tokens, per_channel=per_channel), launch)


@BOTH
@pytest.mark.parametrize("decay", [0.0, 0.01, 1.0, 5.0, 30.0, 300.0])
def test_decays_of_every_strength(decay: float, per_channel: bool) -> None:
    check(arguments(decay=decay, per_channel=per_channel))
    check(arguments(decay=decay, per_channel=per_channel, dtype=torch.float32))


@BOTH
def test_decay_to_nothing_and_no_write(per_channel: bool) -> None:
    args = list(arguments(per_channel=per_channel))
    args[3][:, 100] = -math.inf
    args[3][:, 120:125] = 0.0
    args[4][:, 140:160] = 0.0
    check(tuple(args))


@BOTH
@pytest.mark.parametrize("launch", ["segments=1", "segments=4"])
def test_packed_sequences(launch: str, per_channel: bool) -> None:
    bounds = torch.tensor([0, 1, 1, 66, 130, 700], dtype=torch.int32, device="cuda")
    state = torch.randn(5, 4, 128, 128, device="cuda")
    args = arguments(700, per_channel=per_channel, cu_seqlens=bounds, initial_state=state)
    check(args, launch)


@BOTH
def test_gates_inside(per_channel: bool) -> None:
    draw = torch.Generator("cuda").manual_seed(1)
    shape = (4, 128) if per_channel else (4,)
    bias = torch.randn(shape, generator=draw, device="cuda")
    for gate, beta in (("softplus", 1.0), ("bounded", 2.0)):
        args = list(arguments(per_channel=per_channel, gate=gate, beta_sigmoid=beta, dt_bias=bias,
                              a_log=torch.randn(4, generator=draw, device="cuda")))  # fmt: skip
        args[3] = torch.randn(args[3].shape, generator=draw, device="cuda").bfloat16()
        check(tuple(args))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_benchmarked_shapes(case: Any) -> None:
    args = case.make(torch.device("cuda"), torch.Generator("cuda").manual_seed(0))
    check(args)


@BOTH
def test_nearly_equal_keys(per_channel: bool) -> None:
    """Rounding u and w to bfloat16 costs two decimals here, whatever solves the system."""
    args = list(arguments(1024, 2, 2, per_channel=per_channel, decay=1e-4))
    args[1] = (args[1][:, :1] + 0.05 * args[1].float()).bfloat16()
    check(tuple(args), tolerance=4e-2)


@BOTH
def test_rows_past_two_to_the_31(per_channel: bool) -> None:
    """64-bit row offsets: q, k and v are windows of rows that span more than 2^31 elements."""
    args = list(arguments(640, 1, 1, per_channel=per_channel))
    wide = torch.empty(640, 1 << 22, dtype=torch.bfloat16, device="cuda")
    for index in range(3):
        window = wide[:, 128 * index : 128 * (index + 1)]
        args[index] = window.copy_(args[index][0, :, 0])[None, :, None]
    check(tuple(args))


@BOTH
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_and_captured(dynamic: bool, per_channel: bool) -> None:
    assert_compiled_and_captured(OP, (arguments(tokens, per_channel=per_channel) for tokens in (300, 128)), dynamic)


def test_schema() -> None:
    torch.library.opcheck(OP, arguments(70, 1, 2), test_utils=("test_schema", "test_faketensor"))
