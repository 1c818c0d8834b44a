"""View algebra: following coordinates agrees with what torch reads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.sizes import Sizes, Unsupported, assignments
from fusion_passes.views import is_alias, is_view, ravel, step, unravel
from tests import tracing

aten, prims = torch.ops.aten, torch.ops.prims
View = Callable[[Tensor], Tensor]


def follow(node: Node, sizes: Sizes) -> Tensor:
    """The row-major index in the graph input that each element of a view shows, and the fill where it shows none."""
    index = torch.arange(sizes.numel(node))
    coords, shown = unravel(index, sizes.shape(node)), torch.ones(len(index), dtype=torch.bool)
    filled = torch.zeros(len(index))
    while node.op != "placeholder":
        found = step(node, coords, sizes)
        node, coords = found.source, found.coords
        if found.valid is not None:
            assert found.fill is not None
            filled = torch.where(shown & ~found.valid, torch.full_like(filled, found.fill), filled)
            shown = shown & found.valid
            coords = [torch.where(found.valid, c, 0) for c in coords]
    return torch.where(shown, ravel(coords, sizes.shape(node)).double(), filled.double())


def assert_followed(function: View, shape: tuple[int, ...], decompositions: Sequence[bool]) -> None:
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    for decompose in decompositions:
        module = tracing.trace(function, x, decompose=decompose)
        node = tracing.result(module)
        if decompose and any(not is_view(n) for n in module.graph.nodes if n.op == "call_function" and n.users):
            continue  # a decomposition into something else than views, such as an index
        (sizes,) = assignments(module.graph)
        assert torch.equal(follow(node, sizes), function(x).double().reshape(-1))


SINGLE: dict[str, tuple[View, tuple[int, ...]]] = {
    "reshape": (lambda x: x.reshape(6, 4), (2, 3, 4)),
    "view": (lambda x: x.view(-1, 3, 2), (2, 3, 4)),
    "reshape of transposed": (lambda x: x.transpose(0, 2).reshape(3, -1), (2, 3, 4)),
    "unsafe view": (lambda x: aten._unsafe_view(x, [4, 6]), (2, 3, 4)),
    "to rank 0": (lambda x: x.reshape([]), (1, 1)),
    "from rank 0": (lambda x: x.expand(2, 3), ()),
    "permute": (lambda x: x.permute(2, 0, -2), (2, 3, 4)),
    "transpose": (lambda x: x.transpose(-1, 0), (2, 3, 4)),
    "t": (lambda x: x.t(), (2, 3)),
    "t of a vector": (lambda x: aten.t(x), (3,)),
    "unsqueeze": (lambda x: x.unsqueeze(-1).unsqueeze(0), (2, 3)),
    "squeeze": (lambda x: x.squeeze(), (1, 2, 1, 3)),
    "squeeze dim": (lambda x: x.squeeze(1).squeeze(0), (1, 2, 1, 3)),
    "squeeze dims": (lambda x: x.squeeze((0, -2)), (1, 2, 1, 3)),
    "expand": (lambda x: x.expand(4, 2, -1, 3), (2, 1, 3)),
    "slice": (lambda x: x[:, 1:3], (2, 4)),
    "slice negative": (lambda x: x[..., -3:-1], (2, 4)),
    "slice step": (lambda x: x[1::2, ::3], (5, 7)),
    "slice before the start": (lambda x: x[-9:2], (4,)),
    "select": (lambda x: x[:, -2], (2, 3, 4)),
    "select to rank 0": (lambda x: x[1], (3,)),
    "split": (lambda x: x.split(3, 1)[1], (2, 7)),
    "split with sizes": (lambda x: x.split([1, 4, 2], -1)[2], (2, 7)),
    "chunk": (lambda x: x.chunk(3, -1)[2], (2, 7)),
    "unbind": (lambda x: x.unbind(1)[2], (2, 3, 4)),
    "alias": (lambda x: aten.alias(x.detach()), (2, 3)),
    "clone": (lambda x: x.t().contiguous().clone(), (2, 3)),
    "diagonal": (lambda x: x.diagonal(), (3, 4)),
    "diagonal above": (lambda x: x.diagonal(1, -2, -1), (2, 3, 4)),
    "diagonal below": (lambda x: x.diagonal(-2, 2, 0), (5, 2, 4)),
    "flip": (lambda x: x.flip(0, -1), (2, 3, 4)),
    "rev": (lambda x: prims.rev(x, [1]), (2, 3, 4)),
    "roll": (lambda x: x.roll((1, -2), (0, 2)), (2, 3, 4)),
    "roll flat": (lambda x: x.roll(5), (2, 3, 4)),
    "as_strided": (lambda x: x.as_strided((3, 2, 2), (2, 1, 4), 3), (4, 4)),
    "as_strided of a slice": (lambda x: x[1:].as_strided((2, 3), (1, 2), 5), (4, 4)),
    "pad": (lambda x: torch.nn.functional.pad(x, (1, 2, 0, 3), value=-7.0), (2, 3)),
    "pad negative": (lambda x: torch.nn.functional.pad(x, (-1, 2, 1, -2), value=5.0), (4, 3)),
    "pad infinite": (lambda x: torch.nn.functional.pad(x, (0, 1), value=float("-inf")), (4, 3)),
    "repeat": (lambda x: x.repeat(2, 3, 1), (3, 2)),
    "unfold": (lambda x: x.unfold(1, 3, 2), (2, 7)),
    "tril": (lambda x: x.tril(-1), (2, 4, 3)),
    "triu": (lambda x: x.triu(1), (2, 4, 3)),
    "prims transpose": (lambda x: prims.transpose(x, [1, 2, 0]), (2, 3, 4)),
    "prims broadcast_in_dim": (lambda x: prims.broadcast_in_dim(x, [3, 2, 5], [1, 2]), (2, 1)),
    "empty": (lambda x: x[2:2].reshape(0, 2), (4, 3)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_one_view(name: str) -> None:
    # functionalization does not know prims
    assert_followed(*SINGLE[name], decompositions=[False] if name.startswith("prims") else [False, True])


def test_every_listed_view_has_a_rule() -> None:
    for target in (semantics.VIEWS | semantics.COPIES) - semantics.SPLITS:
        node = torch.fx.Graph().call_function(target, ())
        assert is_view(node), target


def draw_view(data: st.DataObject, shape: tuple[int, ...]) -> View:
    """A random view of a tensor of the given shape."""

    def pick(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    rank = len(shape)
    kinds = ["unsqueeze", "flat", "repeat", "clone", "expand"]
    if rank:
        kinds += ["permute", "slice", "select", "flip", "roll", "pad", "chunk", "split axis", "unbind", "squeeze"]
        kinds += ["unfold"]
    if rank > 1:
        kinds += ["diagonal", "tril", "merge", "transpose"]
    kind = data.draw(st.sampled_from(kinds))
    axis = pick(0, rank - 1) if rank else 0
    signed = axis - rank if rank and data.draw(st.booleans()) else axis
    size = shape[axis] if rank else 1
    if kind in ("permute", "flip"):
        order = data.draw(st.permutations(range(rank)))
        return (lambda x: x.permute(order)) if kind == "permute" else lambda x: x.flip(order[: 1 + axis])
    if kind == "slice":
        start, stop, stride = pick(-size - 1, size), pick(-size, size + 1), pick(1, 3)
        return lambda x: aten.slice(x, signed, start, stop, stride)
    if kind == "pad":
        pads = [pick(-1, 2) if size > 2 else pick(0, 2) for _ in range(2)]
        return lambda x: torch.nn.functional.pad(x, [0, 0] * (rank - 1 - axis) + pads, value=-1.5)
    if kind == "split axis":
        inner = data.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])) if size else 1
        return lambda x: x.reshape(*shape[:axis], size // inner, inner, *shape[axis + 1 :])
    if kind == "unfold":
        length, stride = pick(0 if size == 0 else 1, max(size, 0)), pick(1, 2)
        return lambda x: x.unfold(signed, length, stride)
    if kind == "diagonal":
        offset, other = pick(-1, 1), (axis + 1) % rank
        ok = -shape[axis] <= offset <= shape[other]
        return lambda x: x.diagonal(offset if ok else 0, signed, other)
    amount = pick(0, 3)
    simple: dict[str, View] = {
        "unsqueeze": lambda x: x.unsqueeze(axis),
        "flat": lambda x: x.reshape(-1),
        "repeat": lambda x: x.repeat(1 + amount % 2, *(1 + (i == axis) for i in range(rank))),
        "clone": lambda x: x.contiguous(),
        "expand": lambda x: x.expand(2, *shape),
        "select": lambda x: x.select(signed, amount % size) if size else x,
        "roll": lambda x: x.roll(amount - 1, signed),
        "chunk": lambda x: x.chunk(2, signed)[-1],
        "unbind": lambda x: x.unbind(signed)[-1] if size else x,
        "squeeze": lambda x: x.squeeze(signed),
        "tril": lambda x: x.tril(amount - 1),
        "merge": lambda x: x.reshape(-1, *shape[2:]) if all(shape) else x,
        "transpose": lambda x: x.transpose(signed, 0),
    }
    return simple[kind]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_chains_of_views(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    steps: list[View] = []
    x = torch.zeros(shape)
    for _ in range(data.draw(st.integers(1, 6))):
        view = draw_view(data, tuple(x.shape))
        if view(x).numel() > 4096 or view(x).dim() > 6:
            continue
        steps.append(view)
        x = view(x)

    def chain(x: Tensor) -> Tensor:
        for view in steps:
            x = view(x)
        return x

    start = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    module = tracing.trace(chain, start, decompose=False)
    (sizes,) = assignments(module.graph)
    node = tracing.result(module)
    assert torch.equal(follow(node, sizes), chain(start).double().reshape(-1))


def test_symbolic_sizes_in_arguments() -> None:
    def function(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % 4))
        return padded.reshape(x.shape[0], -1, 4)[:, -1].split([1, 3], -1)[1]

    module = tracing.trace(function, torch.zeros(3, 10), symbolic=True)
    for sizes in assignments(module.graph):
        (leaf,) = tracing.placeholders(module.graph)
        x = torch.arange(float(sizes.numel(leaf))).reshape(sizes.shape(leaf))
        node = tracing.result(module)
        assert torch.equal(follow(node, sizes), function(x).double().reshape(-1))


def test_as_strided_of_a_strided_tensor_is_refused() -> None:
    module = tracing.trace(lambda x: x.t().as_strided((2, 2), (1, 1)), torch.zeros(3, 4))
    node = tracing.result(module)
    with pytest.raises(Unsupported, match="not contiguous"):
        step(node, unravel(torch.arange(4), (2, 2)), assignments(module.graph)[0])


def test_a_pointwise_node_is_not_a_view() -> None:
    module = tracing.trace(lambda x: x + 1, torch.zeros(3))
    with pytest.raises(Unsupported, match="add"):
        step(tracing.result(module), [torch.arange(3)], Sizes())


def test_element_of_a_tuple_that_is_no_split() -> None:
    module = tracing.trace(lambda x: x.topk(2)[0], torch.zeros(3))
    node = tracing.result(module)
    assert node.target is operator.getitem and not is_view(node)
    with pytest.raises(Unsupported, match="not a split"):
        step(node, [torch.arange(2)], Sizes())


def test_real_tensors_under_a_fake_mode() -> None:
    module = tracing.trace(lambda x: x[1].t(), torch.zeros(2, 3, 4))
    coords = unravel(torch.arange(12), (4, 3))
    with FakeTensorMode():
        found: Any = step(tracing.result(module), coords, Sizes())
    assert type(found.coords[0]) is Tensor and found.coords[0].tolist() == coords[1].tolist()


def test_aliases() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        view = x[1:].t()
        return view, view.clone(), x.sum()

    module = tracing.trace(function, torch.zeros(3, 4))
    (leaf,) = tracing.placeholders(module.graph)
    view, copy, _ = (tracing.result(module, i) for i in range(3))
    assert is_alias(view, leaf) and is_alias(leaf, view)
    assert not is_alias(copy, leaf)
