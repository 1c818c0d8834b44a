"""The values that go into the cast of an MLA key or value, compared with what the fused op computes from its leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes.access import AxisMap
from fusion_passes.evaluate import Evaluator, hashed
from fusion_passes.fusion import NearMiss
from fusion_passes.ops import _mla_kv_pack_steps as steps_of
from fusion_passes.patterns._mla_chain import repeats
from fusion_passes.probe import Draw, agree
from fusion_passes.sizes import Sizes
from fusion_passes.views import Coords, concrete_tensors, ravel, unravel

SEEDS = (1, 2)
ROWS = 24  # of which all columns are looked at
SPECIAL = (0.0, 1e3, -1e3, 448.0, -57344.0, float("inf"), float("nan"))

# coordinates of a result -> where each is read in a leaf, and for which of them that leaf is the one
Read = tuple[Node, Callable[[Coords], tuple[Coords, Tensor]]]


def check_values(
    root: Node, columns: int, reads: Sequence[Read], steps: str, scale: Node | None, sizes: Sizes
) -> list[Node]:
    """Evaluate `root` at whole rows of `columns` and compare with the steps taken on the leaves' values.

    Returns:
        Casts to narrower floats on the way, which the fused op does not perform.

    Raises:
        NearMiss: the values differ.
        Unsupported: they cannot be evaluated.
    """
    parsed = steps_of.parse(steps)
    roundings: list[Node] = []
    with concrete_tensors():
        for seed in SEEDS:
            coords = _places(sizes.shape(root), columns, seed)
            draws = {leaf: _draw(leaf, 10 * seed + i, sizes) for i, (leaf, _) in enumerate(reads)}
            numbers = {scale: hashed(100 + seed, 0.25, 4.0)} if scale is not None else {}
            evaluator = Evaluator({**draws, **numbers}, sizes, round_float8=False)
            values = evaluator.values(root, ravel(coords, sizes.shape(root)))
            expected = torch.full_like(values, float("nan"))
            for leaf, where in reads:
                read, chosen = where(coords)
                found = draws[leaf](ravel(read, sizes.shape(leaf)))
                expected = torch.where(chosen, found, expected)
            factor = numbers[scale](torch.zeros(1, dtype=torch.int64)) if scale is not None else None
            expected = _in_range(steps_of.apply(expected, factor, parsed), root)
            values = _in_range(values, root)
            if not agree(values, expected):
                raise NearMiss(_difference(values, expected, steps))
            roundings = evaluator.roundings
    return roundings


def _draw(leaf: Node, seed: int, sizes: Sizes) -> Draw:
    """Random values by element; elements that share their memory are one."""
    values, shape, still = hashed(seed, -600.0, 600.0, SPECIAL), sizes.shape(leaf), repeats(leaf)

    def draw(index: Tensor) -> Tensor:
        return values(ravel([c * 0 if a in still else c for a, c in enumerate(unravel(index, shape))], shape))

    return draw if still else values


def _in_range(values: Tensor, root: Node) -> Tensor:
    """Values that a cast to the dtype of `root` tells apart: beyond the range of a float8 type all are one."""
    dtype = root.meta["val"].dtype
    return values.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max) if dtype.itemsize == 1 else values


def _places(shape: Sequence[int], columns: int, seed: int) -> Coords:
    """Whole runs of `columns` neighbouring elements, some at the ends of the result."""
    generator = torch.Generator().manual_seed(seed)
    runs = max(int(torch.Size(shape).numel()) // columns, 1)
    first = torch.randint(runs, (ROWS,), generator=generator)
    first[:2] = torch.tensor([0, runs - 1])
    flat = (first[:, None] * columns + torch.arange(columns)).reshape(-1)
    coords: Coords = []
    for size in reversed(shape):
        coords.append(flat % size)
        flat = flat // size
    return coords[::-1]


def within(
    axes: AxisMap, frame: Callable[[Coords], Coords], start: int, end: int
) -> Callable[[Coords], tuple[Coords, Tensor]]:
    """Reads of a part: the columns `start` to `end` of a frame, found through the axes of the part's leaf."""

    def look(coords: Coords) -> tuple[Coords, Tensor]:
        *rows, column = frame(coords)
        chosen = (column >= start) & (column < end)
        return axes.read([*rows, torch.where(chosen, column - start, 0)]), chosen

    return look


def _difference(values: Tensor, expected: Tensor, steps: str) -> str:
    wrong = ~((values == expected) | (values.isnan() & expected.isnan()))
    at = int(wrong.nonzero()[0])
    formula = steps or "the parts as they are"
    found, wanted = float(values[at]), float(expected[at])
    return f"its values are not those of a key ({formula}): one is {found:.6g}, not {wanted:.6g}"
