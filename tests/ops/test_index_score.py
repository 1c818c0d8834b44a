"""`torch.ops.fusion_passes.index_score` on CPU: the reference, the schema, what is refused, the launch choice."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusion_passes import arch, tuning
from fusion_passes.lowering import Launch, Program, Target
from fusion_passes.ops._index_score_launch import KINDS, TABLE, plan, unsupported
from fusion_passes.ops.index_score import OP, cases, index_score, reference
from fusion_passes.plans import operand_of
from tests.support.index_score import E4, Arguments, draw, expected, hidden, in_batch_order, relative_error

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("kind", ["none", "keep", "drop", "add", "causal"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, E4])
@pytest.mark.parametrize("layout", ["bst", "tsb"])
def test_values(kind: str, dtype: torch.dtype, layout: str) -> None:
    scales = "qk" if dtype == E4 else ""
    args = draw(2, 5, 12, dtype=dtype, scales=scales, layout=layout, **hidden(kind, 2, 5, 12))
    assert relative_error(in_batch_order(OP(*args.positional()), layout), expected(args)) < 1e-6


@pytest.mark.parametrize("keep_nan", [False, True])
@pytest.mark.parametrize("scale_after", [False, True])
def test_scales_and_nan(keep_nan: bool, scale_after: bool) -> None:
    args = draw(scales="k", scale_after=scale_after, keep_nan=keep_nan)
    args.q[0, 1, 2, 3] = math.nan
    found = OP(*args.positional())
    assert relative_error(found, expected(args)) < 1e-6
    assert bool(found[0, 1].isnan().all()) is keep_nan


def test_reference_computes_in_float64_on_float64() -> None:
    args = draw(scales="qk", **hidden("add", 1, 5, 40))
    wide: list[Any] = [a.double() if isinstance(a, torch.Tensor) else a for a in args.positional()]
    out = reference(*wide)
    assert out.dtype == torch.float64 and relative_error(out, expected(args)) < 1e-14


# --- the function ----------------------------------------------------------------------------------------------------


def test_with_and_without_batches() -> None:
    args = draw(scales="qk")
    assert args.q_scale is not None and args.k_scale is not None
    full = index_score(args.q, args.k, args.w, scale=0.3, q_scale=args.q_scale, k_scale=args.k_scale)
    assert relative_error(full, expected(args)) < 1e-6
    rows = index_score(args.q[0], args.k[0], args.w[0], scale=0.3, q_scale=args.q_scale[0], k_scale=args.k_scale[0])
    assert torch.equal(rows, full[0])


@pytest.mark.parametrize("shape", [(40,), (5, 1), (5, 40), (1, 5, 40), (2, 1, 40)])
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    args = draw(2)
    mask = torch.rand(shape) < 0.5
    plain = index_score(args.q, args.k, args.w)
    found = index_score(args.q, args.k, args.w, mask=mask, fill=-7.0)
    assert torch.equal(found, plain.masked_fill(~mask, -7.0))
    torch.testing.assert_close(index_score(args.q, args.k, args.w, mask=mask.float()), plain + mask.float())


def test_causal_offset() -> None:
    args = draw(1, 5, 9)
    found = index_score(args.q, args.k, args.w, causal_offset=4)
    hidden_keys = torch.arange(9) > torch.arange(5)[:, None] + 4
    assert torch.equal(found, index_score(args.q, args.k, args.w, mask=~hidden_keys))
    assert bool(found[0, -1].isfinite().all()) and int(found[0, 0].isfinite().sum()) == 5


def test_the_function_says_what_it_takes() -> None:
    args = draw()
    with pytest.raises(ValueError, match=r"q must be \[B, S, H, D\] or \[S, H, D\], got shape \[8, 16\]"):
        index_score(args.q[0, 0], args.k, args.w)
    with pytest.raises(ValueError, match="mask and causal_offset exclude one another"):
        index_score(args.q, args.k, args.w, mask=torch.ones(5, 40), causal_offset=0)
    with pytest.raises(ValueError, match=r"mask must broadcast to \[B, S, T\] = \[1, 5, 40\], got shape \[5, 41\]"):
        index_score(args.q, args.k, args.w, mask=torch.ones(5, 41))
    with pytest.raises(TypeError, match="a mask that is added must be bfloat16.*int64"):
        index_score(args.q, args.k, args.w, mask=torch.ones(5, 40, dtype=torch.int64))


# --- the op ----------------------------------------------------------------------------------------------------------

ONES = torch.ones(1, 5, 40)


@pytest.mark.parametrize(
    "changes, error_type, words",
    [
        ({"q": torch.zeros(5, 8, 16)}, ValueError, r"q must be \[B, S, H, D\], got shape \[5, 8, 16\]"),
        ({"k": torch.zeros(40, 16)}, ValueError, r"k must be \[B, T, D\], got shape \[40, 16\]"),
        ({"k": torch.zeros(1, 40, 24)}, ValueError, r"k must be \[B, T, D\] = \[1, 40, 16\].*\[1, 40, 24\]"),
        ({"w": torch.zeros(1, 5, 7)}, ValueError, r"w must be \[B, S, H\] = \[1, 5, 8\].*\[1, 5, 7\]"),
        ({"q_scale": torch.zeros(1, 5)}, ValueError, r"q_scale must be \[B, S, H\].*\[1, 5\]"),
        ({"k_scale": torch.zeros(1, 5)}, ValueError, r"k_scale must be \[B, T\] = \[1, 40\].*\[1, 5\]"),
        ({"mask": torch.zeros(1, 40, 5), "mask_kind": "add"}, ValueError, r"mask must be \[B, S, T\].*\[1, 40, 5\]"),
        ({"k": torch.zeros(1, 40, 16)}, TypeError, r"k must have the dtype of q \(torch.bfloat16\), got torch.float32"),
        ({"q": torch.zeros(1, 5, 8, 16).double()}, TypeError, "q must be bfloat16.*float64"),
        ({"w": torch.zeros(1, 5, 8).double()}, TypeError, "w must be bfloat16.*float64"),
        ({"w": torch.zeros(1, 5, 8, device="meta")}, ValueError, r"w must be on the device of q \(cpu\), got meta"),
        ({"dtype": torch.int64}, TypeError, "dtype must be.*int64"),
        ({"q": torch.zeros(1, 5, 8, 32).bfloat16()[..., ::2]}, ValueError, r"q must have a last stride of 1.*2\]"),
        ({"mask_kind": "window"}, ValueError, "mask_kind must be one of none, keep, drop, add, causal, got 'window'"),
        ({"mask_kind": "keep"}, ValueError, "mask_kind 'keep' goes with a mask"),
        ({"mask": ONES}, ValueError, "mask_kind 'none' goes without a mask"),
        ({"mask": ONES, "mask_kind": "keep"}, TypeError, "must be bool, got torch.float32"),
        ({"mask": ONES.bool(), "mask_kind": "add"}, TypeError, "a mask that is added must be.*bool"),
        ({"scale": 0.0}, ValueError, "scale must be a positive number, got 0.0"),
        ({"scale": math.inf}, ValueError, "scale must be a positive number, got inf"),
        ({"fill": math.nan}, ValueError, "fill must be a number or an infinity, got nan"),
        ({"precision": "double"}, ValueError, "precision must be one of ieee, tf32x3, tf32, got 'double'"),
        ({"layout": "bts_"}, ValueError, "layout must be the letters b, s and t"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error_type: type[Exception], words: str) -> None:
    with pytest.raises(error_type, match=words):
        OP(*dataclasses.replace(draw(), **changes).positional())


@pytest.mark.parametrize("heads, width, words", [(129, 16, "1 to 128 heads, got 129"), (8, 20, "a multiple of 8.*20"),
                                                 (8, 8, "from 16 to 256, got 8"), (8, 264, "got 264")])  # fmt: skip
def test_heads_and_channels_that_are_refused(heads: int, width: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OP(*draw(heads=heads, width=width).positional())


@pytest.mark.parametrize("kind, queries, layout", [("none", 5, "bst"), ("add", 3, "sbt"), ("causal", 0, "bts")])
def test_opcheck(kind: str, queries: int, layout: str) -> None:
    mask = hidden(kind, 2, queries, 12)
    args = draw(2, queries, 12, scales="k", layout=layout, **mask)
    assert set(torch.library.opcheck(OP, args.positional()).values()) == {"SUCCESS"}


def test_there_is_no_gradient() -> None:
    args = draw(dtype=F32)
    args.q.requires_grad_()
    with pytest.raises(NotImplementedError, match="index_score has no gradient"):
        OP(*args.positional()).sum().backward()


def test_fake_tensors_cause_no_guard() -> None:
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    args = draw(2, 7, 12)
    free, fixed = DimDynamic.DYNAMIC, DimDynamic.STATIC

    def fake(name: str, t: torch.Tensor, *axes: DimDynamic) -> torch.Tensor:
        context: Any = StatelessSymbolicContext([*axes])
        return mode.from_tensor(t, symbolic_context=context, source=ConstantSource(name))

    q, k = fake("q", args.q, fixed, free, fixed, fixed), fake("k", args.k, fixed, free, fixed)
    with mode:
        out = OP(q, k, fake("w", args.w, fixed, free, fixed), *args.positional()[3:])
    assert all(isinstance(n, torch.SymInt) for n in out.shape[1:]) and not shape_env.guards


# --- launch ----------------------------------------------------------------------------------------------------------


def real(queries: int, keys: int = 8192, dtype: torch.dtype = BF16, heads: int = 64, width: int = 128) -> Arguments:
    """Real sizes without memory."""
    q, k = (torch.empty(1, *shape, dtype=dtype, device="meta") for shape in ((queries, heads, width), (keys, width)))
    return Arguments(q, k, torch.empty(1, queries, heads, device="meta"))


def launch_of(args: Arguments, forced: str = "", on: str = "sm_90", inlined: bool = False) -> Launch:
    with tuning.overriding(**({"index_score": forced} if forced else {})):
        target = Target(arch.by_name(on), int, inlined)
        (launch,) = Program.of(plan(target, *map(operand_of, args.positional()))).launches
    return launch


@pytest.mark.parametrize("queries", [1, 16, 64, 2048, 8192])
@pytest.mark.parametrize("keys", [5, 1000, 65536])
def test_programs_cover_the_scores_and_the_multiprocessors(queries: int, keys: int) -> None:
    launch = launch_of(real(queries, keys))
    rows, columns = -(-queries // launch.args["ROWS"]), -(-keys // launch.args["KEYS"])
    assert launch.grid == (rows * columns,)
    if "heads" in launch.args:
        assert rows * columns >= 132 or launch.args["KEYS"] <= 64
        assert launch.args["ROWS"] == 64, "a product of fewer rows leaves half of a tensor core idle"
    else:
        assert rows * columns >= 132 or launch.args["ROWS"] == launch.args["STEP"]
        assert launch.args["ROWS"] % launch.args["STEP"] == 0


def test_few_queries_take_a_product_of_many_heads_and_many_queries_one_per_head() -> None:
    few, many = (launch_of(real(queries)).args for queries in (64, 2048))
    assert "heads" not in few and few["BH"] == 64
    assert many["heads"] == 64 and "STEP" not in many
    # Rows that are known to exist are not masked.
    tails = [launch_of(real(n), inlined=known).args["ROWS_IN"] for n in (2048, 2000) for known in (True, False)]
    assert tails == [True, True, False, False]


@pytest.mark.parametrize("heads, step", [(1, 8), (8, 8), (12, 4), (16, 4), (24, 2), (64, 1), (100, 1)])
def test_a_step_takes_as_many_queries_as_make_a_product(heads: int, step: int) -> None:
    launch = launch_of(real(100, heads=heads))
    assert launch.args["STEP"] == step and launch.args["BH"] == max(8, 1 << (heads - 1).bit_length())


def test_sizes_that_vary_do_not_compile_a_kernel_anew() -> None:
    """An eager launch compiles in strides of 1, and whether queries fill their blocks; a compiled graph all strides."""
    first, second = (launch_of(real(queries, keys)).args for queries, keys in ((2048, 8192), (1984, 8191)))
    upper = [name for name in first if name.isupper()]
    assert {n: first[n] for n in upper} == {n: second[n] for n in upper}
    assert launch_of(real(2048), inlined=True).args["Q_S"] == 64 * 128


@pytest.mark.parametrize("queries", [1, 64, 2048])
def test_products_of_float8_are_of_32_channels_at_least(queries: int) -> None:
    depths = [launch_of(real(queries, dtype=dtype, width=16)).args["BD"] for dtype in (BF16, E4)]
    assert depths == [16, 32]


@pytest.mark.parametrize("fill, number, infinite", [(-math.inf, -1.0, True), (math.inf, 1.0, True), (-1e39, -1.0, True),
                                                    (-1e9, -1e9, False), (0.0, 0.0, False)])  # fmt: skip
def test_infinite_fills_are_a_flag(fill: float, number: float, infinite: bool) -> None:
    launch = launch_of(dataclasses.replace(real(64), mask_kind="causal", fill=fill))
    assert (launch.args["FILL"], launch.args["INFINITE"]) == (number, infinite)


@pytest.mark.parametrize(
    "forced, words",
    [
        ("warps=64", "64 warps are 2048 threads"),
        ("keys=8", "a tile has 16 keys at least, got 8"),
        ("columns=0,queries=8", "columns=0. takes 16 queries at least, got 8"),
        ("columns=256,queries=2", "one product takes 4 queries of 64 heads; queries=2 is less"),
        ("keys=1024,warps=4", "would hold 1024 values"),
        ("keys=512,warps=16,stages=8", "the tiles take"),
        ("keys=24", "keys of index_score must be a power of two"),
    ],
)
def test_launch_parameters_that_cannot_run(forced: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        launch_of(real(2048), forced)


def test_every_entry_of_the_table_runs_on_every_gpu() -> None:
    """Or the GPU is refused for what it lacks."""
    for on in arch.TABLE:
        for dtype in (BF16, E4, F32):
            for heads, width in ((8, 64), (24, 96), (64, 128), (128, 256)):
                reason = unsupported(arch.by_name(on), dtype, heads, width)
                for queries in (1, 64, 5000):
                    if reason is None:
                        launch_of(real(queries, 8192, dtype, heads, width), on=on)
                    else:
                        with pytest.raises(NotImplementedError, match="index_score"):
                            launch_of(real(queries, 8192, dtype, heads, width), on=on)
    assert {name.removesuffix("_decode") for name in TABLE.entries["default"]} == {*KINDS.values()}


def test_gpus_without_float8_or_memory_are_named() -> None:
    assert "(sm_80) has no products of float8_e4m3fn" in str(unsupported(arch.by_name("sm_80"), E4, 64, 128))
    reason = str(unsupported(arch.by_name("sm_80"), F32, 128, 256))
    assert "128 heads of 256 channels in float32 are too many: the tiles take" in reason
    assert unsupported(arch.by_name("sm_90"), F32, 64, 128) is None


# --- benchmark cases -------------------------------------------------------------------------------------------------


def test_cases_declare_what_they_move() -> None:
    small = [case for case in cases() if case.bytes < 2 << 20]
    assert len(small) >= 2
    for case in small:
        args = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))
        out = case.op(*args)
        tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
        assert case.bytes == sum(t.numel() * t.element_size() for t in tensors)
        assert case.plain is not None
        exact = case.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        for result in (out, case.plain(*args)):
            assert relative_error(result, exact) < 1e-5


def test_flops_are_those_of_the_keys_that_are_seen() -> None:
    names = {case.name: case.flops for case in cases()}
    full, causal = names["bf16 2048x8192 H=64 none"], names["bf16 2048x8192 H=64 causal"]
    assert full == 2 * 2048 * 8192 * 64 * 128 and causal == full * (8192 - 1023.5) / 8192
