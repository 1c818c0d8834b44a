"""Changes of single nodes of a matched graph, and the test that whatever is fused afterwards keeps its value."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from fusion_passes import aten as semantics
from fusion_passes.graph_pass import FusionPass
from fusion_passes.settings import snapshot

aten, prims = torch.ops.aten, torch.ops.prims

SWAPS: dict[Any, tuple[Any, ...]] = {
    aten.exp.default: (aten.exp2.default, aten.expm1.default),
    aten.log.default: (aten.log2.default, aten.log1p.default),
    aten.log1p.default: (aten.log.default,),
    aten.sigmoid.default: (aten.tanh.default,),
    aten.abs.default: (aten.neg.default, aten.relu.default),
    aten.neg.default: (aten.abs.default,),
    aten.maximum.default: (aten.minimum.default, aten.add.Tensor),
    aten.add.Tensor: (aten.sub.Tensor, aten.mul.Tensor, aten.maximum.default),
    aten.sub.Tensor: (aten.add.Tensor, aten.rsub.Tensor),
    aten.mul.Tensor: (aten.add.Tensor, aten.div.Tensor, aten.sub.Tensor),
    aten.div.Tensor: (aten.mul.Tensor,),
    aten.logaddexp.default: (aten.maximum.default, aten.logaddexp2.default),
}
COMPARISONS = [getattr(aten, name).Scalar for name in ("gt", "ge", "lt", "le", "eq")]

Change = Callable[[Graph, Node], None]


@dataclasses.dataclass
class Tracing:
    """A matched graph, its example inputs and what makes other ones."""

    module: GraphModule
    inputs: list[Tensor]


def captured(function: Callable[..., Any], args: tuple[Any, ...]) -> Tracing:
    """The post-grad graph of a call, as the pass sees it."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    found: list[Tracing] = []

    def look(gm: GraphModule, example_inputs: Any, **unused: Any) -> Any:
        forward = gm.forward

        def run(*inputs: Any) -> Any:
            view_to_reshape(gm)
            found.append(Tracing(gm, [i.detach().clone() for i in inputs]))
            return forward(*inputs)

        return make_boxed_func(run)

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        with inductor_config.patch(force_disable_caches=True):
            return compile_fx(gm, example_inputs, inner_compile=look)

    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)
    return found[0]


def changed_argument(position: int, value: Any) -> Change:
    def change(graph: Graph, node: Node) -> None:
        args = list(node.args)
        args[position] = value
        node.args = tuple(args)

    return change


def changed_target(target: Any) -> Change:
    def change(graph: Graph, node: Node) -> None:
        node.target = target

    return change


def dropped(source: Node) -> Change:
    def change(graph: Graph, node: Node) -> None:
        node.replace_all_uses_with(source_in(graph, source))

    return change


def source_in(graph: Graph, node: Node) -> Node:
    return next(n for n in graph.nodes if n.name == node.name)


def cast_behind(dtype: torch.dtype, back: torch.dtype) -> Change:
    def change(graph: Graph, node: Node) -> None:
        with graph.inserting_after(node):
            narrow = graph.call_function(prims.convert_element_type.default, (node, dtype))
        with graph.inserting_after(narrow):
            wide = graph.call_function(prims.convert_element_type.default, (narrow, back))
        node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not narrow)

    return change


def numbers(node: Node) -> Iterator[tuple[str, Change]]:
    """Other constants, axes, bounds, widths, shapes and orders among the plain arguments."""
    for position, value in enumerate(node.args):
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, float) or (isinstance(value, int) and node.target in semantics.POINTWISE):
            for other in {value * 1.01, value + 1e-3, -float(value), 0.0, value * 2 + 1} - {value}:
                yield "constant", changed_argument(position, other)
        elif isinstance(value, int):
            for other in (value - 1, value + 1):
                yield "axis, bound or index", changed_argument(position, other)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
            values = list(value)
            for i in range(len(values)):
                for step in (-1, 1):
                    moved = [*values[:i], values[i] + step, *values[i + 1 :]]
                    yield "width, length or order", changed_argument(position, moved)
            for i, j in itertools.combinations(range(len(values)), 2):
                if values[i] != values[j]:
                    turned = list(values)
                    turned[i], turned[j] = values[j], values[i]
                    yield "order", changed_argument(position, turned)
            for i in range(len(values) - 1):
                if values[i] % 2 == 0:
                    halved = [*values[:i], values[i] // 2, values[i + 1] * 2, *values[i + 2 :]]
                    yield "shape", changed_argument(position, halved)
        elif isinstance(value, torch.dtype):
            for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int32):
                if dtype != value:
                    yield f"cast target {str(dtype)[6:]}", changed_argument(position, dtype)


def operands(node: Node, earlier: list[Node]) -> Iterator[tuple[str, Change]]:
    """Swapped operands, other operands of the same shape, and the node left out."""
    nodes = [i for i, arg in enumerate(node.args) if isinstance(arg, Node)]
    for i, j in itertools.combinations(nodes, 2):

        def swapped(graph: Graph, at: Node, i: int = i, j: int = j) -> None:
            args = list(at.args)
            args[i], args[j] = args[j], args[i]
            at.args = tuple(args)

        yield "swapped operands", swapped
    for i in nodes:
        old = node.args[i]
        assert isinstance(old, Node)
        for other in [n for n in earlier if n is not old and like(n, old)][-4:]:

            def put(graph: Graph, at: Node, i: int = i, other: Node = other) -> None:
                changed_argument(i, source_in(graph, other))(graph, at)

            yield "other operand", put
        if like(old, node):
            yield "node left out", dropped(old)


def like(a: Node, b: Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, Tensor) and isinstance(y, Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype)


def other_operators(node: Node, swaps: Mapping[Any, Iterable[Any]]) -> Iterator[tuple[str, Change]]:
    """The operators that `swaps` has for the node's."""
    for target in swaps.get(node.target, ()):
        yield "other operator", changed_target(target)


def round_trips(node: Node, *dtypes: torch.dtype) -> Iterator[tuple[str, Change]]:
    """Casts behind the node to those of the dtypes that are not its own, and back."""
    own = node.meta["val"].dtype
    for dtype in dtypes:
        if dtype != own:
            yield f"round trip through {str(dtype)[6:]}", cast_behind(dtype, own)


def others(node: Node, after_sum: bool) -> Iterator[tuple[str, Change]]:
    """Another operator in place, and casts there and back behind the node."""
    yield from other_operators(node, SWAPS)
    if node.target in COMPARISONS:
        for target in COMPARISONS:
            if target is not node.target:
                yield "other comparison", changed_target(target)
    value = node.meta.get("val")
    # behind the cumsum a coarse cast would tell apart what is equal to rounding
    if isinstance(value, Tensor) and value.is_floating_point() and not after_sum:
        yield from round_trips(node, torch.int32, torch.float8_e4m3fn, torch.bool)
        if value.dtype == torch.float32:
            yield from round_trips(node, torch.bfloat16)


def single_changes(
    graph: Graph, further: Callable[[Node], Iterable[tuple[str, Change]]], leave: Any = None
) -> Iterator[tuple[str, str, Change]]:
    """(node, kind, change) of every change of a single node: of numbers, of operands, and those that `further` says.

    Nodes with the operator `leave` are not changed.
    """
    earlier: list[Node] = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is not leave:
            for kind, change in itertools.chain(numbers(node), operands(node, earlier), further(node)):
                yield node.name, kind, change
        earlier.append(node)


def mutants(graph: Graph) -> Iterator[tuple[str, str, Change]]:
    """Every change of a single node of a graph with sums of gates."""
    after_sum = set(itertools.dropwhile(lambda node: node.target is not aten.cumsum.default, graph.nodes))
    return single_changes(graph, lambda node: others(node, node in after_sum))


def mutated(tracing: Tracing, name: str, change: Change, mode: FakeTensorMode) -> GraphModule | None:
    """A copy of the graph with one change and its metadata; None where it does not run."""
    graph = Graph()
    names: dict[Node, Node] = {}
    graph.output(graph.graph_copy(tracing.module.graph, names))
    for old, new in names.items():
        new.name = old.name
    try:
        change(graph, next(n for n in graph.nodes if n.name == name))
        graph.eliminate_dead_code()
        graph.lint()
        module = GraphModule(tracing.module, graph)
        fakes = [mode.from_tensor(i, static_shapes=True) for i in tracing.inputs]
        with mode:
            Propagate(module).run(*fakes)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError, NotImplementedError):
        return None
    return module


class Propagate(Interpreter):
    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        n.meta["val"] = result
        return result


def same(actual: Any, expected: Any, tolerance: float) -> bool:
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        a, b = a.double(), b.double()
        special = ~(a.isfinite() & b.isfinite())
        if not bool(((a == b) | (a.isnan() & b.isnan()))[special].all()):
            return False
        largest = float(b[~special].abs().max()) if bool((~special).any()) else 0.0
        if not bool(((a - b).abs()[~special] <= tolerance * max(largest, 1e-30)).all()):
            return False
    return True


def copied(graph: Graph) -> Graph:
    copy = Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def result(module: GraphModule, inputs: list[Tensor]) -> Any:
    """What a graph computes; None where it cannot run, such as with arithmetic on float8."""
    try:
        return module(*inputs)
    except (RuntimeError, NotImplementedError, TypeError, IndexError):
        return None


def check_mutants(
    tracing: Tracing,
    changes: Iterable[tuple[str, str, Change]],
    draws: Callable[[int], list[Tensor]],
    agrees: Callable[[Any, Any, str, Graph], bool],
    most: int,
    run: Callable[[GraphModule, list[Tensor]], Any] = result,
    rounds: int = 1,
    **own: Any,
) -> collections.Counter[str]:
    """Make up to `most` mutants, in random order, and compare those that are fused with what they were before.

    Args:
        tracing: the matched graph.
        changes: (node, kind, change) of all changes of single nodes.
        draws: the inputs for a seed, another one for every mutant and round.
        agrees: whether the fused result is the original one, given also the kind of the change and the graph.
        run: results of a graph; None where it cannot run, and then the mutant does not count.
        rounds: of inputs per fused mutant.
        own: settings by their short names.

    Returns:
        The numbers of "mutants" that ran and of those that were "fused".

    Raises:
        AssertionError: a mutant was rewritten and gives something else; the message holds the first graphs.
    """
    settings = snapshot({"strict": True, "reference_on_cpu": True, **own})
    survivors, counts, mode = list[str](), collections.Counter[str](), FakeTensorMode()
    shuffled = list(changes)
    random.Random(0).shuffle(shuffled)
    for index, (name, kind, change) in enumerate(shuffled):
        if counts["mutants"] == most:
            break
        module = mutated(tracing, name, change, mode)
        if module is None or run(module, inputs := draws(rounds * index)) is None:
            continue
        counts["mutants"] += 1
        rewritten = GraphModule(module, copied(module.graph))
        explained = FusionPass(settings)
        explained(rewritten.graph)
        if not any(record.outcome == "fused" for record in explained.found):
            continue
        counts["fused"] += 1
        rewritten.recompile()
        for seed in range(rounds * index, rounds * (index + 1)):
            inputs = draws(seed)
            if not agrees(run(rewritten, inputs), run(module, inputs), kind, module.graph):
                survivors.append(f"{kind} at {name}: {explained.found}\n{module.graph}\n{rewritten.graph}")
                break
    assert not survivors, "\n\n".join(survivors[:3]) + f"\n{len(survivors)} wrong rewrites"
    return counts
