"""`torch.ops.fusion_passes.rotate_pairs_` on CPU: the reference, the schema, what is refused, the launch."""

from __future__ import annotations

from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

from fusion_passes.arch import by_name
from fusion_passes.lowering import NotInlinable, Operand, Target
from fusion_passes.ops.rotate_pairs import FEW_ROWS, OP, plan, reference, rotate_pairs_
from fusion_passes.plans import operand_of
from tests.support.rotate_pairs import LAYOUTS, PAIRINGS, SHARED, close, exact, halves, neighbours, normal


def arguments(**changes: Any) -> tuple[Any, ...]:
    """Valid arguments of the op in order, some of them replaced by name."""
    cos, sin = normal(2, 3, 5, 1, 4, seed=1), normal(2, 3, 5, 1, 4, seed=2)
    named = {"pairs": halves(normal(2, 3, 5, 12), 8), "cos": cos, "sin": sin, "inverse": False}
    assert set(changes) <= set(named)
    return (*{**named, **changes}.values(),)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("inverse", [False, True])
def test_values(pairing: str, shared: str, inverse: bool) -> None:
    x = normal(2, 3, 5, 12, dtype=torch.bfloat16)
    cos, sin = (normal(*SHARED[shared], 4, seed=seed) for seed in (1, 2))
    before = x.clone()
    wanted = exact(PAIRINGS[pairing](before, 8), cos, sin, inverse)
    OP(PAIRINGS[pairing](x, 8), cos, sin, inverse)
    close(PAIRINGS[pairing](x, 8), wanted)
    assert torch.equal(x[..., 8:], before[..., 8:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_memory_is_changed_where_it_lies(layout: str, pairing: str) -> None:
    x = LAYOUTS[layout](normal(2, 3, 5, 12))
    cos, sin = normal(2, 1, 5, 1, 4, seed=1), normal(2, 1, 5, 1, 4, seed=2)
    wanted = exact(PAIRINGS[pairing](x, 8), cos, sin)
    rotate_pairs_(PAIRINGS[pairing](x, 8), cos, sin)
    close(PAIRINGS[pairing](x, 8), wanted)


def test_rotation_and_back() -> None:
    x, angles = normal(2, 3, 5, 12), normal(1, 1, 5, 1, 4)
    before = x.clone()
    for inverse in (False, True):
        rotate_pairs_(neighbours(x, 8), angles.cos(), angles.sin(), inverse=inverse)
    torch.testing.assert_close(x, before)


def test_reference_leaves_its_input() -> None:
    args = arguments()
    before = args[0].clone()
    close(reference(*args), exact(*args))
    assert torch.equal(args[0], before)


@pytest.mark.parametrize(
    "args",
    [
        arguments(),
        arguments(pairs=neighbours(normal(2, 3, 5, 12), 8), inverse=True),
        arguments(cos=normal(1, 1, 1, 2, 4), sin=normal(1, 3, 1, 1, 4)),
        arguments(pairs=halves(normal(0, 3, 5, 8), 8), cos=normal(1, 1, 1, 1, 4), sin=normal(1, 1, 1, 1, 4)),
    ],
    ids=["halves", "neighbours", "shared", "empty"],
)
def test_opcheck(args: tuple[Any, ...]) -> None:
    assert set(torch.library.opcheck(OP, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"pairs": torch.zeros(2, 3, 2, 4)}, ValueError, r"\[A, B, C, 2, N\], got shape \[2, 3, 2, 4\]"),
        ({"pairs": torch.zeros(2, 3, 5, 4, 2)}, ValueError, r"\[A, B, C, 2, N\], got shape \[2, 3, 5, 4, 2\]"),
        ({"pairs": torch.zeros(2, 3, 5, 2, 4, dtype=torch.float64)}, TypeError, "pairs must be .*got float64"),
        ({"cos": torch.zeros(2, 3, 5, 1, 4, dtype=torch.int32)}, TypeError, "cos must be one of .*got int32"),
        ({"sin": torch.zeros(2, 3, 5, 1, 4, device="meta")}, ValueError, "sin must be on cpu as pairs is, got meta"),
        ({"sin": torch.zeros(2, 3, 5, 1, 1)}, ValueError, r"sin must have pairs' shape .*got \[2, 3, 5, 1, 1\]"),
        ({"cos": torch.zeros(2, 2, 5, 1, 4)}, ValueError, r"cos must have pairs' shape .*got \[2, 2, 5, 1, 4\]"),
        ({"cos": torch.zeros(5, 1, 4)}, ValueError, r"cos must have pairs' shape .*got \[5, 1, 4\]"),
        ({"pairs": torch.zeros(2, 3, 1, 2, 4).expand(2, 3, 5, 2, 4)}, ValueError, "no element twice, got strides"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        OP(*arguments(**changes))


@pytest.mark.parametrize("name", ["pairs", "cos", "sin"])
def test_no_gradient(name: str) -> None:
    pairs, cos, sin, _ = arguments(**{name: arguments()[("pairs", "cos", "sin").index(name)].requires_grad_()})
    with pytest.raises(NotImplementedError, match="no gradient"):
        rotate_pairs_(pairs, cos, sin)


# --- the launch -------------------------------------------------------------------------------------------------------


def launch(x: Tensor, width: int = 32) -> Any:
    cos = torch.empty(1, 1, x.shape[2], 1, width, device="meta")
    return plan(Target(by_name("sm_90"), int), operand_of(halves(x, 2 * width)), operand_of(cos), operand_of(cos))


def test_few_rows_still_give_many_programs() -> None:
    few, many = (launch(torch.empty(1, 1, rows, 128, device="meta")) for rows in (FEW_ROWS, FEW_ROWS + 1))
    assert few.args["ROWS"] * 8 == many.args["ROWS"] and few.grid == (FEW_ROWS // few.args["ROWS"],)


def test_strides_of_axes_of_length_one_do_not_count() -> None:
    assert launch(torch.empty(1, 1, 7, 128, device="meta")).args["x_a"] == 0


def test_pairs_at_symbolic_distances_are_not_inlined() -> None:
    pairs = operand_of(halves(torch.empty(1, 1, 7, 8, device="meta"), 8))
    distance = sympy.Symbol("s", integer=True, positive=True)
    moved = Operand(pairs.shape, (*pairs.strides[:3], distance, 1), 0, pairs.dtype, pairs.device, None, None)
    cos = operand_of(torch.empty(1, 1, 7, 1, 4, device="meta"))
    with pytest.raises(NotInlinable, match="symbolic size"):
        plan(Target(by_name("sm_90"), int), moved, cos, cos)
