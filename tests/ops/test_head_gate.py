"""`torch.ops.fusion_passes.head_gate` on CPU: the reference, the schema, what is refused, the launch choice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusion_passes import arch, tuning
from fusion_passes.lowering import Launch, Output, Program, Target
from fusion_passes.ops.head_gate import OP, TABLE, cases, form_of, head_gate, plan, reference
from fusion_passes.plans import operand_of
from tests.support.head_gate import BF16, F16, F32, FORMS, Arguments, bound, draw, error


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
def test_values(form: str, dtype: torch.dtype, head_first: bool, with_scale: bool) -> None:
    args = draw(2, 3, form=form, with_scale=with_scale, dtype=dtype, head_first=head_first)
    assert error(OP(*args.positional()), args) <= bound(args)


def test_the_product_is_rounded_before_it_is_scaled() -> None:
    args = draw(form="rounded", with_scale=False, scale=0.3)
    out = OP(*args.positional())
    product = (args.x @ args.weight.mT).float()
    assert torch.equal(out, product * 0.3) and not torch.equal(out.bfloat16().float(), out)


def test_reference_computes_in_float64_on_float64() -> None:
    args = draw().positional()
    wide: list[Any] = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    out = reference(*wide)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, wide[0] @ wide[1].mT * args[3] * wide[2], rtol=1e-14, atol=0)


def test_two_and_three_axes() -> None:
    args = draw(1, 4)
    full = head_gate(args.x, args.weight, args.q_scale, scale=2.0)
    assert args.q_scale is not None
    assert torch.equal(head_gate(args.x[0], args.weight, args.q_scale[0], scale=2.0), full[0])
    assert torch.equal(head_gate(args.x[0], args.weight, args.q_scale[0].unsqueeze(-1), scale=2.0), full[0])


@pytest.mark.parametrize("shape", [(4, 1), (24,), (1, 24), (1, 1)])
def test_scales_broadcast(shape: tuple[int, ...]) -> None:
    args = draw(1, 4, with_scale=False)
    q_scale = torch.rand(shape)
    out = head_gate(args.x[0], args.weight, q_scale, scale=0.5)
    torch.testing.assert_close(out, head_gate(args.x[0], args.weight) * 0.5 * q_scale)


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("head_first", [False, True])
def test_opcheck(tokens: int, head_first: bool) -> None:
    args = draw(2, tokens, head_first=head_first)
    assert set(torch.library.opcheck(OP, args.positional()).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "changes, error_type, words",
    [
        ({"x": torch.zeros(3, 200).bfloat16()}, ValueError, r"x must be \[B, T, K\], got shape \[3, 200\]"),
        ({"weight": torch.zeros(24, 100)}, ValueError, r"weight must be \[H, K\] with K = 200.*\[24, 100\]"),
        ({"weight": torch.zeros(24)}, ValueError, r"weight must be \[H, K\].*\[24\]"),
        ({"q_scale": torch.zeros(1, 5, 23)}, ValueError, r"q_scale must be \[B, T, H\] = \[1, 5, 24\].*\[1, 5, 23\]"),
        ({"q_scale": torch.zeros(5, 24)}, ValueError, r"q_scale must be.*\[5, 24\]"),
        ({"x": torch.zeros(1, 5, 200).int()}, TypeError, "x must be bfloat16, float16 or float32, got int32"),
        ({"weight": torch.zeros(24, 200).double()}, TypeError, "weight must be bfloat16.*float64"),
        ({"q_scale": torch.zeros(1, 5, 24).double()}, TypeError, "q_scale must be bfloat16.*float64"),
        ({"weight": torch.zeros(24, 200, device="meta")}, ValueError, r"weight must be on the device of x \(cpu\)"),
        ({"product_dtype": torch.float64}, TypeError, "product_dtype must be bfloat16.*float64"),
        ({"dtype": torch.int64}, TypeError, "dtype must be bfloat16.*int64"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error_type: type[Exception], words: str) -> None:
    with pytest.raises(error_type, match=words):
        OP(*dataclasses.replace(draw(), **changes).positional())


def test_the_function_says_what_it_takes() -> None:
    args = draw(1, 4)
    with pytest.raises(ValueError, match=r"x must be \[T, K\] or \[B, T, K\], got shape \[200\]"):
        head_gate(args.x[0, 0], args.weight)
    with pytest.raises(ValueError, match=r"q_scale must broadcast to \[4, 24\], got shape \[5, 24\]"):
        head_gate(args.x[0], args.weight, torch.zeros(5, 24))
    with pytest.raises(ValueError, match=r"weight must be \[H, K\], got shape \[200\]"):
        head_gate(args.x[0], args.weight[0], torch.zeros(4, 24))


def test_there_is_no_gradient() -> None:
    args = draw(form="float32", with_scale=False)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        head_gate(args.x.requires_grad_(), args.weight).sum().backward()


def test_fake_tensors_cause_no_guard() -> None:
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    args = draw(2, 7)
    context: Any = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(args.x, symbolic_context=context, source=ConstantSource("x"))
    with mode:
        out = OP(x, mode.from_tensor(args.weight, static_shapes=True), None, *args.positional()[3:])
    assert isinstance(out.shape[1], torch.SymInt) and out.shape[2] == 24 and not shape_env.guards


def program_of(args: Arguments, forced: str = "", on: str = "sm_90") -> Program:
    with tuning.overriding(**({"head_gate": forced} if forced else {})):
        return Program.of(plan(Target(arch.by_name(on), int), *map(operand_of, args.positional())))


def real(tokens: int, form: str = "rounded", heads: int = 64) -> Arguments:
    """Real sizes without memory."""
    x_dtype, w_dtype, product = FORMS[form]
    x = torch.empty(1, tokens, 7168, dtype=x_dtype, device="meta")
    return Arguments(x, torch.empty(heads, 7168, dtype=w_dtype, device="meta"), product_dtype=product)


@pytest.mark.parametrize("dtypes, form", [((BF16, BF16, BF16), "rounded"), ((F16, F16, F32), "exact"),
                                          ((BF16, F32, F32), "split_weight"), ((F32, BF16, F32), "split_x"),
                                          ((F32, F32, F32), "float32"), ((F16, F32, F32), "float32")])  # fmt: skip
def test_forms(dtypes: tuple[torch.dtype, ...], form: str) -> None:
    assert form_of(*dtypes) == form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("tokens", [1, 16, 64, 2048, 8192])
def test_one_launch_whose_programs_cover_the_product(form: str, on: str, tokens: int) -> None:
    program = program_of(real(tokens, form), on=on)
    (launch,) = program.launches
    if "ROWS" not in launch.args:
        assert launch.grid == (tokens * 64,)
        return
    tiles, splits = launch.grid
    assert tiles * launch.args["ROWS"] * launch.args["HEADS"] >= tokens * 64
    steps = -(-7168 // launch.args["DEPTH"])
    # Every program of a tile has something to do, and their shares are the whole depth.
    assert -(-steps // splits) * (splits - 1) < steps and launch.args["MOST_SPLITS"] == splits
    assert (tiles - 1) * splits < arch.by_name(on).multiprocessors or splits == 1
    scratch = [value for value in launch.args.values() if isinstance(value, Output) and value not in program.outputs]
    sizes = [torch.Size(output.shape).numel() for output in scratch]
    assert sizes == (
        [tiles * splits * launch.args["ROWS"] * launch.args["HEADS"], tiles * splits] if splits > 1 else []
    )


def test_few_rows_of_transposed_weights_use_tensor_cores() -> None:
    args = real(1)
    assert "FORM" not in program_of(args).launches[0].args
    transposed = dataclasses.replace(args, weight=torch.empty(7168, 64, dtype=BF16, device="meta").mT)
    assert program_of(transposed).launches[0].args["FORM"] == "rounded"


@pytest.mark.parametrize(
    "forced, words",
    [
        ("tensor=1,rows=8", "tiles of 16 and more, got rows=8"),
        ("warps=64", "64 warps are 2048 threads"),
        ("tensor=1,rows=256,heads=128,warps=4", "would hold 256 sums"),
        ("tensor=0,depth=65536,warps=1", "would hold 2048 sums"),
        ("tensor=1,rows=64,heads=64,depth=512,stages=4,warps=4", "take 393216 bytes"),
        ("rows=24", "rows of head_gate must be a power of two"),
    ],
)
def test_launch_parameters_that_cannot_run(forced: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        program_of(real(64), forced)


def test_every_entry_of_the_table_runs_on_every_gpu() -> None:
    for on in arch.TABLE:
        for form in FORMS:
            for tokens in (1, 9, 17, 100, 300, 5000):
                for heads in (8, 20, 128):
                    assert isinstance(program_of(real(tokens, form, heads), on=on).launches[0], Launch)
    assert all(name.removesuffix("_symbolic") in ("half", "split", "float32") for name in TABLE.entries["default"])


def test_cases_declare_what_they_move() -> None:
    for case in cases():
        if case.bytes > 4 << 20:
            continue
        args = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))
        out = case.op(*args)
        tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
        assert case.bytes == sum(t.numel() * t.element_size() for t in tensors)
        assert case.flops == 2 * args[0].numel() * args[1].shape[0]
        assert case.plain is not None
        exact = case.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        for result in (out, case.plain(*args)):
            assert float((result.double() - exact).norm() / exact.norm()) < 3e-3


def test_eager_calls_of_an_empty_batch() -> None:
    args = draw(2, 0)
    assert OP(*args.positional()).shape == (2, 0, 24)
