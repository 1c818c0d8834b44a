"""Fusions from a search function: what to look for is plain PyTorch, and so is the proof that it was found.

A fusion by meaning (see `patterns/`) writes down itself where its leaves are and what the subgraph must compute. Where
a function says both, `fusion` makes a `Fusion` of it in two steps:

- *The graph proposes.* The function is traced with example inputs as Inductor would trace it, and its operators are
  laid over the graph (`fusion_passes.overlay`) whatever the order of commuting operands, and whatever views, casts and
  factors lie between. That names candidates for the leaves and the result.
- *The meaning decides.* The function is traced again for the very shapes and dtypes of the leaves, under every
  admissible assignment of sizes, and both graphs are evaluated at the same elements of the same random inputs.

So a wrong constant, a transposed operand or a reduction over another axis is refused although it looks alike. What is
written with other operators, such as `x * sigmoid(2 x)` for a formula with tanh, or with another order of additions, is
not found: describe such a fusion by its meaning.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import advice, overlay, probe, rewrite
from fusion_passes import aten as semantics
from fusion_passes.evaluate import Evaluator, hashed
from fusion_passes.fusion import Context, Fusion, NearMiss, Reason, Site
from fusion_passes.sizes import Sizes

aten = torch.ops.aten

# What a search function may be made of: operators that treat all elements alike, which samples can therefore prove. A
# matrix product rounds its result: that has to be looked at by a fusion's own `match`.
_KNOWN: frozenset[object] = (
    frozenset(semantics.POINTWISE) | frozenset(semantics.FOLDS) | semantics.SCANS | semantics.CASTS | semantics.COPIES
    | frozenset(semantics.FILL_ARGUMENT) | frozenset(semantics.FILL_VALUE) | overlay.CARRIERS | semantics.SPLITS
    | {aten.slice.Tensor, aten.select.int, operator.getitem}
)  # fmt: skip

_MOST_READINGS = 24  # choices of leaves and result that are compared for one candidate
_WHOLE = 2048  # results of up to this many elements are compared in full
_SAMPLES = 512
_MOST_REPEATS = 16
_RELATIVE = 1e-7  # a number may be written in float64 in one graph and in float32 in the other

# Uniform ranges of the leaves' values: ordinary ones, those next to zero, far out, and with special values among them.
_DRAWS: tuple[tuple[float, float, tuple[float, ...]], ...] = (
    (-8.0, 8.0, ()),
    (-1e-3, 1e-3, ()),
    (-1e3, 1e3, ()),
    (-8.0, 8.0, (0.0, 1e3, -1e3, math.inf, -math.inf, math.nan)),
)


def _always(site: Site, context: Context) -> Reason:
    return None


def fusion(
    name: str,
    doc: str,
    search: Callable[..., Tensor],
    op: torch._ops.OpOverload,
    inputs: Sequence[Tensor],
    *,
    guard: Callable[[Site, Context], Reason] = _always,
    profit: Callable[[Site, Context], Reason] = _always,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32),
    default: bool = True,
    tolerance: float = 1e-5,
) -> Fusion:
    """A fusion that puts `op` wherever a graph computes what `search` computes.

    Args:
        name: name of the fusion.
        doc: one line for `python -m fusion_passes list`.
        search: a function of tensors that returns one tensor: pointwise operators, reductions, scans and views, without
            matrix products and without tensors of its own. It has to work for every shape that it is meant to find.
        op: the functional operator that takes the place, with the parameters of `search` in the same order.
        inputs: one example tensor for each parameter; their shapes and dtypes do not restrict what is found.
        guard, profit, dtypes, default, tolerance: as for `Fusion`; the leaves of a site have the names of the
            parameters of `search`.

    Raises:
        ValueError: `search` cannot be looked for; the message says why.
        TypeError: `op` is not an operator overload.
    """
    if not isinstance(op, torch._ops.OpOverload):
        raise TypeError(f"fusion {name!r}: op must be an overload such as torch.ops.mylib.f.default, got {op!r}")
    pattern = _Pattern(name, search, op, tuple(inspect.signature(search).parameters))
    anchor = pattern.prepare(inputs)
    return Fusion(
        name, doc, overlay.overloads(anchor), pattern.match, pattern.replace, guard, profit,
        dtypes=dtypes, default=default, tolerance=tolerance, sources=(search,),
    )  # fmt: skip


def trace(search: Callable[..., Any], inputs: Sequence[Tensor]) -> Graph:
    """The post-grad ATen graph of `search` for contiguous tensors like `inputs`, without values."""
    from torch._inductor.decomposition import select_decomp_table

    with torch.device("meta"), torch.no_grad():
        empty = [torch.empty(t.shape, dtype=t.dtype) for t in inputs]
        decomposed = make_fx(search, select_decomp_table())(*empty)
        graph = make_fx(torch.func.functionalize(decomposed, remove="mutations"))(*empty).graph
    graph.eliminate_dead_code()
    return graph


@dataclasses.dataclass(eq=False)
class _Pattern:
    """A search function, the operator that stands for it, and its traces."""

    name: str
    search: Callable[..., Tensor]
    op: torch._ops.OpOverload
    names: tuple[str, ...]
    example: Graph | None = None
    traces: dict[tuple[Any, ...], Graph] = dataclasses.field(default_factory=dict)

    def prepare(self, inputs: Sequence[Tensor]) -> Node:
        """Trace the examples, and choose the node from whose likes a search starts."""
        if len(inputs) != len(self.names):
            raise ValueError(f"fusion {self.name!r}: {len(self.names)} parameters, {len(inputs)} example inputs")
        try:
            self.example = trace(self.search, inputs)
        except Exception as error:
            raise ValueError(f"fusion {self.name!r}: the search function cannot be traced: {error}") from error
        result = _result(self.example)
        if not isinstance(result, Node) or not isinstance(result.meta.get("val"), Tensor):
            raise ValueError(f"fusion {self.name!r}: the search function must return one tensor")
        for node in self.example.nodes:
            if node.op == "get_attr":
                raise ValueError(f"fusion {self.name!r}: the search function uses a tensor that is no parameter of it")
            if node.op == "call_function" and node.target not in _KNOWN:
                raise ValueError(f"fusion {self.name!r}: the search function calls {node.target}, which is not handled")
        unused = [node.name for node in self.example.find_nodes(op="placeholder") if not node.users]
        if unused:
            raise ValueError(f"fusion {self.name!r}: the search function does not use {', '.join(unused)}")
        return overlay.rarest(result, self.name)

    def match(self, anchor: Node, context: Context) -> Site:
        """The site around `anchor`, proved for every assignment of sizes."""
        assert self.example is not None
        missed = NearMiss(f"nothing that uses it looks like the search function of {self.name}")
        for laid in overlay.candidates(_result(self.example), anchor):
            for root, leaves in itertools.islice(self._readings(laid), _MOST_READINGS):
                try:
                    return self._prove(anchor, root, leaves, context)
                except NearMiss as reason:
                    missed = reason
        raise missed

    def _readings(self, laid: overlay.Overlay) -> Iterator[tuple[Node, list[Node]]]:
        """Every choice of a result and of leaves: the furthest apart first, which leaves the fewest nodes behind."""
        assert self.example is not None
        chains = [laid.leaves[parameter] for parameter in self.example.find_nodes(op="placeholder")]
        for leaves in itertools.product(*chains):
            for root in overlay.results(laid.root):
                yield root, list(leaves)

    def _prove(self, anchor: Node, root: Node, leaves: list[Node], context: Context) -> Site:
        interior = overlay.between(root, leaves)
        roundings: list[Node] = []
        for sizes in context.sizes:
            pattern = self._traced(leaves, sizes)
            result = _result(pattern)
            value, old = result.meta["val"], root.meta["val"]
            if value.numel() != sizes.numel(root) or value.dtype != old.dtype:
                shape, made = list(sizes.shape(root)), list(value.shape)
                raise NearMiss(f"it is {old.dtype} {shape} where the search function gives {value.dtype} {made}")
            if _reductions(pattern.nodes) != _reductions(interior):
                raise NearMiss("it reduces in another dtype than the search function")
            roundings = _compare(pattern, result, root, leaves, sizes)
        named = dict(zip(self.names, leaves))
        shapes = ", ".join(f"{name} {list(leaf.meta['val'].shape)}" for name, leaf in named.items())
        return Site(anchor, root, named, interior, roundings=roundings, summary=shapes)

    def _traced(self, leaves: Sequence[Node], sizes: Sizes) -> Graph:
        """The search function for the shapes and dtypes of these leaves."""
        kinds = tuple((sizes.shape(leaf), leaf.meta["val"].dtype) for leaf in leaves)
        if kinds not in self.traces:
            like = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in kinds]
            try:
                graph = trace(self.search, like)
            except Exception as error:
                shapes = ", ".join(str(list(shape)) for shape, _ in kinds)
                raise NearMiss(f"the search function does not take tensors of {shapes}: {error}") from error
            self.traces[kinds] = graph
        return self.traces[kinds]

    def replace(self, site: Site, graph: Graph) -> Node:
        made = rewrite.call(graph, self.op, *(site.leaves[name] for name in self.names))
        shape, wanted = made.meta["val"].shape, site.replaced.meta["val"].shape
        if len(shape) == len(wanted) and all(statically_known_true(a == b) for a, b in zip(shape, wanted)):
            return made
        symbolic = [n for n in wanted if not isinstance(n, int)]
        if len(symbolic) > 1:
            raise NearMiss(f"its result is reshaped to several symbolic sizes: {list(wanted)}", advice.STATIC)
        return rewrite.call(graph, aten.reshape.default, made, [n if isinstance(n, int) else -1 for n in wanted])


def _result(graph: Graph) -> Any:
    return graph.output_node().args[0]


def _reductions(nodes: Any) -> Counter[tuple[Any, torch.dtype]]:
    found = (node for node in nodes if node.target in semantics.FOLDS or node.target in semantics.SCANS)
    return Counter((node.target, node.meta["val"].dtype) for node in found)


def _compare(pattern: Graph, result: Node, root: Node, leaves: Sequence[Node], sizes: Sizes) -> list[Node]:
    """Evaluate both graphs at the same elements, or raise; the roundings that were passed in the subgraph."""
    shape = sizes.shape(root)
    parameters = pattern.find_nodes(op="placeholder")
    roundings: list[Node] = []
    again = min(max(_SAMPLES // max(math.prod(shape), 1), 1), _MOST_REPEATS)  # a small tensor holds few values
    for seed, (low, high, special) in enumerate(_DRAWS * again):
        index = _elements(shape, seed)
        draws = [hashed(17 * seed + leaves.index(leaf), low, high, special) for leaf in leaves]
        ours = Evaluator(dict(zip(leaves, draws)), sizes)
        theirs = Evaluator(dict(zip(parameters, draws)), Sizes())
        values, wanted = ours.values(root, index), theirs.values(result, index)
        largest = wanted.double().nan_to_num(0, 0, 0).abs().max() if wanted.numel() else 0.0
        if not probe.agree(values.double(), wanted.double(), largest, _RELATIVE):
            raise NearMiss("it looks like the search function but computes other values")
        roundings = ours.roundings
    return roundings


def _elements(shape: Sequence[int], seed: int) -> Tensor:
    """Row-major indices: all of a small tensor, else random ones and the corners, where padding would be."""
    numel = math.prod(shape)
    if numel <= _WHOLE:
        return torch.arange(numel)
    generator = torch.Generator().manual_seed(seed)
    corners = list(itertools.islice(itertools.product(*((0, n - 1) if n > 1 else (0,) for n in shape)), 256))
    steps = torch.tensor([math.prod(shape[axis + 1 :]) for axis in range(len(shape))])
    at_corners = (torch.tensor(corners) * steps).sum(-1)
    return torch.cat([torch.randint(numel, (_SAMPLES,), generator=generator), at_corners]).unique()
