"""The key of multi-head latent attention: a tensor of two parts, one of them shared by all heads, and its cast."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.fx import Node

from fusion_passes import advice
from fusion_passes import aten as semantics
from fusion_passes.access import Atom, AxisMap, LeafAxis, factor_axes
from fusion_passes.fusion import Context, NearMiss
from fusion_passes.layout import Piece
from fusion_passes.patterns._mla_chain import BUILDS, FLOAT8, Chain, check_dtypes, text, walk
from fusion_passes.patterns._mla_parts import Build, Part, Roles, axis_map, dtype_of, parse, roles, shared_part
from fusion_passes.patterns._mla_proof import check_values, within
from fusion_passes.patterns._mla_views import composed, memory_steps
from fusion_passes.sizes import Sizes

aten = torch.ops.aten

# What moves values without changing them; casts to other floats do not count as a change.
MOVES = (semantics.VIEWS - semantics.SPLITS) | semantics.COPIES | semantics.CASTS | {aten.copy.default, *BUILDS}


@dataclasses.dataclass(frozen=True)
class Key:
    """A proved key.

    Attributes:
        root: the tensor that the fused op provides.
        chain: from the root back to the frame.
        build: the frame with its two parts.
        shared: which of the parts (0 or 1) all heads share.
        maps: how the axes of each part's leaf are composed of the frame's, the last of which counts its columns.
        root_map: how the frame's axes are composed of the root's.
        roles: tokens and heads among the factors of the frame's axes.
        steps, scale: what happens before the cast.
        roundings: casts to narrower floats that the fused op does not perform.
    """

    root: Node
    chain: Chain
    build: Build
    shared: int
    maps: tuple[AxisMap, AxisMap]
    root_map: AxisMap
    roles: Roles
    steps: str
    scale: Node | None
    roundings: tuple[Node, ...]

    @property
    def parts(self) -> tuple[Part, Part]:
        """The part that differs from head to head, and the shared one."""
        first, second = self.build.parts
        return (first, second) if self.shared == 1 else (second, first)

    def part_map(self, part: Part) -> AxisMap:
        return self.maps[self.build.parts.index(part)]

    def pieces(self, part: Part) -> dict[int, list[Piece]]:
        """The factors of the frame's axes, as the leaf of a part sees them."""
        rows = {axis: list(found) for axis, found in enumerate(self.roles.per_axis)}
        return {**rows, len(rows): [self.column(part)]}

    def column(self, part: Part) -> Piece:
        return Piece(len(self.roles.per_axis), 1, part.width, True)

    def memory(self, part: Part, sizes: Sizes) -> dict[Piece, int]:
        """How far one step of each factor moves in the memory of a part's leaf."""
        return memory_steps(part.leaf, self.part_map(part), self.pieces(part), sizes)


def roots(anchor: Node) -> Iterator[Node]:
    """What may be the finished key for a cast at `anchor`: the last tensor built from it, or the cast itself."""
    reached, pending = {anchor}, [anchor]
    while pending:
        for user in pending.pop().users:
            value = user.meta.get("val")
            moved = user.target in MOVES and isinstance(value, torch.Tensor) and value.dtype in FLOAT8
            if moved and user not in reached:
                reached.add(user)
                pending.append(user)
    yield from sorted((node for node in reached if node.target in BUILDS), reverse=True)
    yield anchor


def prove(root: Node, context: Context) -> Key | None:
    """The key that `root` is, the same under every assignment of sizes; None where nothing is put together.

    Raises:
        NearMiss: it is put together, but is no key.
        Unsupported: it cannot be evaluated.
    """
    keys = []
    for sizes in context.sizes:
        chain = walk(root, sizes)
        if chain.end.target not in BUILDS:
            return None
        keys.append(_prove(root, chain, sizes))
    if any(_form(key) != _form(keys[0]) for key in keys[1:]):
        raise NearMiss("it is a key for some sizes only", advice.STATIC)
    return keys[0]


def _prove(root: Node, chain: Chain, sizes: Sizes) -> Key:
    build = parse(chain.end, sizes)
    if len(build.parts) != 2:
        raise NearMiss(f"it is put together from {len(build.parts)} parts, a key from two")
    first, second = (axis_map(build, part, sizes) for part in build.parts)
    shared = shared_part(build, (first, second), sizes)
    found = roles(build, (first, second), shared, sizes)
    dtype_of(build.parts)
    forms = []
    for part in build.parts:
        on_the_way = part.chain.nodes[: part.chain.nodes.index(part.leaf) + 1]
        dtype = check_dtypes((*chain.nodes, *on_the_way))
        forms.append(text((*part.chain.steps, *chain.steps), dtype))
    if forms[0] != forms[1]:
        (left, _), (right, _) = forms
        reason = f"its parts take different steps before the cast: {left or 'none'} and {right or 'none'}"
        raise NearMiss(reason, "scale, clamp and cast the whole key, after its parts are put together")
    steps, scale = forms[0]
    held = (scale,) if scale is not None else ()
    root_map = factor_axes(root, build.frame, sizes, stop=held) if root is not build.frame else _identity(root, sizes)
    if composed(root_map) is None:
        raise NearMiss("only a part of it is cast, or it is cast in another order than it was put together")
    reads = [
        (part.leaf, within(axes, root_map.read, part.start, part.end))
        for part, axes in zip(build.parts, (first, second))
    ]
    roundings = check_values(root, sizes.shape(build.frame)[-1], reads, steps, scale, sizes)
    return Key(root, chain, build, shared, (first, second), root_map, found, steps, scale, tuple(roundings))


def _identity(root: Node, sizes: Sizes) -> AxisMap:
    shape = sizes.shape(root)
    long = [axis for axis, size in enumerate(shape) if size > 1]
    atoms = tuple(Atom(axis, shape[axis], 1) for axis in long)
    axes = tuple(LeafAxis(((long.index(a), 1),) if a in long else ()) for a in range(len(shape)))
    return AxisMap(shape, shape, atoms, axes, tuple(a for a in range(len(shape)) if a not in long))


def _form(key: Key) -> object:
    """What must not depend on sizes."""
    factors = [[(p.axis, p.static) for p in found] for found in (key.roles.tokens, key.roles.heads)]
    parts = [(part.start, part.end, part.leaf) for part in key.build.parts]
    return key.shared, parts, key.steps, key.scale, factors


def is_cast(key: Key) -> bool:
    return key.root.meta["val"].dtype in FLOAT8
