"""The kernels of `head_gate` against float64, on the interpreter; all memory starts as NaN, so each must be written."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fusion_passes import tuning
from fusion_passes.eager import run
from fusion_passes.lowering import Program
from fusion_passes.ops._head_gate_kernel import TOKEN
from fusion_passes.ops.head_gate import plan
from fusion_passes.plans import operand_of
from tests.support.head_gate import BF16, F16, F32, FORMS, Arguments, check, draw, expected, launch, special_values
from tests.support.programs import target_for

WHOLE = "rows=16,heads=16,depth=64,splits=1,warps=4,stages=2,tensor=1"
SHARED = "rows=16,heads=16,depth=32,splits=5,warps=4,stages=2,tensor=1"
WIDE = "rows=64,heads=32,depth=64,splits=2,warps=4,stages=2,tensor=1"
ROW = "rows=1,heads=1,depth=64,splits=1,warps=4,stages=1,tensor=0"


@pytest.mark.parametrize("forced", [WHOLE, SHARED, WIDE])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, forced: str) -> None:
    check(draw(2, 9, form=form), forced)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_few_rows(form: str) -> None:
    # A program for each element, which the interpreter runs one by one.
    check(draw(2, 2, 3, form=form), ROW)


@pytest.mark.parametrize("heads", [8, 16, 33])
@pytest.mark.parametrize("tokens", [1, 16, 19])
@pytest.mark.parametrize("columns", [31, 64, 161])
def test_sizes(tokens: int, heads: int, columns: int) -> None:
    check(draw(1, tokens, heads, columns, form="exact"), SHARED)


@pytest.mark.parametrize("columns", [31, 64, 161])
def test_sizes_of_few_rows(columns: int) -> None:
    check(draw(1, 3, 5, columns, form="exact"), ROW)


@pytest.mark.parametrize("forced", [WHOLE, SHARED, ROW])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("head_first", [False, True])
def test_results(dtype: torch.dtype, head_first: bool, forced: str) -> None:
    form: dict[str, Any] = {"dtype": dtype, "head_first": head_first}
    check(draw(2, 3, 4, form="split_weight", **form), forced)
    check(draw(2, 3, 4, form="exact", with_scale=False, scale=-2.0, **form), forced)


@pytest.mark.parametrize("splits", [2, 3, 4, 7])
def test_any_number_of_splits(splits: int) -> None:
    forced = f"rows=16,heads=16,depth=32,splits={splits},warps=4,stages=2,tensor=1"
    for columns in (200, 224, 97):
        check(draw(1, 20, 24, columns, form="split_weight"), forced)


@pytest.mark.parametrize("forced", [SHARED, ROW])
@pytest.mark.parametrize("inlined", [False, True])
def test_strides(forced: str, inlined: bool) -> None:
    args = draw(2, 2, 3, form="exact")
    assert args.q_scale is not None
    padded = torch.nn.functional.pad(args.x, (8, 16))[..., 8:208]
    time_first = args.x.transpose(0, 1).contiguous().transpose(0, 1)
    columns_first = args.x.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (padded, time_first, columns_first):
        check(dataclasses.replace(args, x=x), forced, inlined)
    for weight in (args.weight.mT.contiguous().mT, torch.nn.functional.pad(args.weight, (0, 8))[:, :200]):
        check(dataclasses.replace(args, weight=weight), forced, inlined)
    per_row, per_head = args.q_scale[..., :1].expand(-1, -1, 3), args.q_scale[:1, :1].expand(2, 2, -1)
    for q_scale in (args.q_scale.transpose(1, 2).contiguous().transpose(1, 2), per_row, per_head, args.q_scale.half()):
        check(dataclasses.replace(args, q_scale=q_scale), forced, inlined)


@pytest.mark.parametrize("forced", [WHOLE, SHARED, ROW])
@pytest.mark.parametrize("form", ["rounded", "exact", "split_weight", "split_x"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinities_and_nan(form: str, forced: str) -> None:
    args = special_values(draw(1, 5, 6, form=form, with_scale=False))
    found, wanted = launch(args, forced), expected(args)
    assert torch.equal(found.isnan(), wanted.isnan()) and wanted.isnan().any()
    infinite = wanted.isinf()
    assert infinite.any() and torch.equal(found[infinite], wanted[infinite].float())
    finite = wanted.isfinite()
    torch.testing.assert_close(found[finite].double(), wanted[finite], rtol=1e-2, atol=1e-2)


def test_the_parts_of_a_weight_are_all_of_it() -> None:
    """Rows with a single one pick single weights, which must come out bit for bit."""
    weight = torch.randn(16, 16) * torch.logspace(-20, 20, 16)
    weight[0, :4] = torch.tensor([1.0000001, 16777215.0, 1.9999999, 3.3e38])
    args = Arguments(torch.eye(16).bfloat16().unsqueeze(0), weight, scale=1.0)
    assert torch.equal(launch(args, WHOLE.replace("depth=64", "depth=16"))[0], weight.mT)


def test_scratch_memory_may_hold_anything_and_keeps_no_flag() -> None:
    args = draw(1, 20, form="split_weight")
    wanted = launch(args, SHARED)
    with tuning.overriding(head_gate=SHARED):
        program = Program.of(plan(target_for(args.x.device), *map(operand_of, args.positional())))
    flags = next(output for output in program.written if output.dtype == torch.int64)
    for content in (0, 1, -1, 2**62, TOKEN.value - 1):
        tensors = {output: torch.full(output.shape, content, dtype=output.dtype) for output in program.written}
        run(program, tensors)
        assert torch.equal(tensors[program.outputs[0]], wanted)
        assert not (tensors[flags] == TOKEN.value).any()


def test_tuned_parameters() -> None:
    for tokens in (1, 12, 70):
        check(draw(1, tokens, 12, 512, form="split_weight"))
        check(draw(1, tokens, 12, 512, form="rounded"))
