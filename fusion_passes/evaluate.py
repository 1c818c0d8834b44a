"""The meaning of a subgraph at chosen elements: lazy evaluation of post-grad ATen nodes in float64.

Only what the asked elements depend on is computed, and each element of each node once, so the cost follows the
number of samples and not the size of the tensors. Inputs are functions of the element's row-major index, for example
`hashed` random numbers. Two nodes that agree at random elements, on random inputs, compute the same function with
overwhelming probability, however differently they are written, provided that neither treats some elements or values
otherwise than the rest: `probe` says what establishes that.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes import aten, element_rules, matrix_rules
from fusion_passes.element_rules import Computation, Rule, value_dtype
from fusion_passes.sizes import Sizes, Unsupported
from fusion_passes.views import axis_of, concrete_tensors

Leaf = Callable[[Tensor], Tensor]

_RULES: dict[Any, Rule] = {**element_rules.RULES, **matrix_rules.RULES}
# calls that return a tuple, some elements of which are known
_TUPLES: frozenset[Any] = aten.SPLITS | {key[0] for key in _RULES if isinstance(key, tuple)}

_LONG_CHAIN = 4  # consecutive writes into one tensor that count as an unrolled loop
_LARGEST_BLOCK = 2**14  # elements of a matrix that is worth computing whole
_NEIGHBOURS = 2  # such matrices that are computed at once: the next chunk of a loop costs little in addition


class Evaluator:
    """Values of node elements in float64 (floats), bool or int64 (integers), computed on demand and remembered.

    Casts between float types are identities, except to float8, which rounds and saturates; every other cast to a
    narrower float type that was passed is listed in `roundings`. Uninitialised memory reads as NaN.

    Args:
        leaves: for each node where the evaluation ends, its values at row-major indices (int64 [n] -> [n]).
        sizes: the integers to use for symbolic sizes.
        budget: the most elements that may be computed, over the lifetime of the evaluator.
        round_float8: False makes casts to float8 identities too, to look at the values that go into them.
    """

    def __init__(
        self, leaves: Mapping[Node, Leaf], sizes: Sizes, budget: int = 2**24, round_float8: bool = True
    ) -> None:
        self.leaves = dict(leaves)
        self.sizes = sizes
        self.budget = budget
        self.round_float8 = round_float8
        self.roundings: list[Node] = []
        self.computed = 0
        self._memo: dict[Node, tuple[Tensor, Tensor]] = {}  # sorted indices, their values
        self._writes: dict[Node, int] = {}

    def values(self, node: Node, index: Tensor) -> Tensor:
        """The elements of `node` at row-major indices: same shape as `index`, float64, bool or int64.

        Raises:
            Unsupported: an operator without known meaning, an input that is no leaf, or more work than the budget.
        """
        with concrete_tensors():
            return self._run(node, index.reshape(-1)).reshape(index.shape)

    def admit(self, node: Node, count: int) -> None:
        """Raise if a single step of the computation of `node` asks for more elements than the budget."""
        if count > self.budget:
            raise Unsupported(f"{node.name} ({node.target}) needs more than {self.budget} elements")

    def has_read(self, node: Node) -> bool:
        """Has any element of `node` been asked for?"""
        return node in self._memo

    def note_rounding(self, node: Node) -> None:
        """Remember that `node` narrows a float type."""
        if node not in self.roundings:
            self.roundings.append(node)

    def _run(self, node: Node, index: Tensor) -> Tensor:
        # computations are generators on an explicit stack, so that long chains need no deep recursion
        stack: list[Computation] = [self._fetch(node, index)]
        answer: Any = None  # what the topmost one asked for
        while stack:
            try:
                request = stack[-1].send(answer)
            except StopIteration as finished:
                stack.pop()
                answer = finished.value
            else:
                stack.append(self._fetch(*request))
                answer = None
        assert isinstance(answer, Tensor)
        return answer

    def _fetch(self, node: Node, index: Tensor) -> Computation:
        """Elements from the memo, computing those that are missing."""
        dtype = value_dtype(node)
        if node in self.leaves:
            return self.leaves[node](index).to(dtype).expand(index.shape)
        if not index.numel():
            return torch.empty(0, dtype=dtype)
        self.admit(node, index.numel())
        increasing = bool((index[1:] > index[:-1]).all())
        wanted, inverse = (index, None) if increasing else torch.unique(index, return_inverse=True)
        missing = self._missing(node, wanted)
        if missing.numel():
            missing = self._enlarged(node, missing)
            self.computed += missing.numel()
            if self.computed > self.budget:
                raise Unsupported(f"evaluating {node.name} takes more than {self.budget} elements")
            values = yield from self._compute(node, missing)
            self._remember(node, missing, values.to(dtype).expand(missing.shape))
        keys, values = self._memo[node]
        found = values if keys.numel() == wanted.numel() else values[torch.searchsorted(keys, wanted)]
        return found if inverse is None else found[inverse]

    def _compute(self, node: Node, index: Tensor) -> Computation:
        if node.op != "call_function":
            raise Unsupported(f"{node.name} ({node.op}) is an input without values")
        rule = _rule_of(node)
        if rule is None:
            parent = node.args[0] if node.target is operator.getitem else node
            target = parent.target if isinstance(parent, Node) else node.target
            raise Unsupported(f"{node.name}: the meaning of {target} is not known")
        return (yield from rule(node, index, self))

    def _missing(self, node: Node, wanted: Tensor) -> Tensor:
        if node not in self._memo:
            return wanted
        keys, _ = self._memo[node]
        position = torch.searchsorted(keys, wanted).clamp_(max=keys.numel() - 1)
        return wanted[keys[position] != wanted]

    def _remember(self, node: Node, index: Tensor, values: Tensor) -> None:
        if node in self._memo:
            keys, known = self._memo[node]
            index, order = torch.sort(torch.cat([keys, index]))
            values = torch.cat([known, values])[order]
        self._memo[node] = (index, values)

    def _enlarged(self, node: Node, missing: Tensor) -> Tensor:
        """Whole matrices instead of single elements where an unrolled loop writes a matrix row by row.

        Every step of such a loop reads rows of the step before. Element by element, the number of visits would grow
        with the square of the number of steps.
        """
        block = self._block(node)
        if block == 1:
            return missing
        run = _NEIGHBOURS * block
        first = torch.unique(missing // run) * run
        whole = (first[:, None] + torch.arange(run)).reshape(-1)
        return self._missing(node, whole[whole < self.sizes.numel(node)])

    def _block(self, node: Node) -> int:
        if node.target not in aten.SCATTERS or node.target is torch.ops.aten.copy.default:
            return 1
        shape = self.sizes.shape(node)
        if len(shape) < 2 or axis_of(aten.arguments(node)["dim"], len(shape)) < len(shape) - 2:
            return 1
        block = math.prod(shape[-2:])
        return block if block <= _LARGEST_BLOCK and self._chain_length(node) >= _LONG_CHAIN else 1

    def _chain_length(self, node: Node) -> int:
        """How many writes into one tensor lead up to and include this node."""
        chain: list[Node] = []
        at: object = node
        while isinstance(at, Node) and at not in self._writes and at.target in aten.SCATTERS | aten.COPIES:
            chain.append(at)
            at = at.args[0]
        length = self._writes.get(at, 0) if isinstance(at, Node) else 0
        for writer in reversed(chain):
            length += writer.target in aten.SCATTERS
            self._writes[writer] = length
        return self._writes[node]


def hashed(seed: int, low: float, high: float, special: Sequence[float] = ()) -> Leaf:
    """Reproducible random values by element: float64, uniform in [low, high), independent for different seeds.

    With `special`, one element in eight takes one of those values instead (a large number, an infinity, a zero).
    """
    salt = _mix_int(seed)

    def draw(index: Tensor) -> Tensor:
        bits = _mix(index + salt)
        values = low + (high - low) * ((bits >> 11) & (2**53 - 1)).double() / 2**53
        if special:
            other = _mix(bits ^ salt)
            table = torch.tensor(list(special), dtype=torch.float64)
            chosen = table[((other >> 3) & 0xFFFFFFFF) % len(special)]
            values = torch.where(other & 7 == 0, chosen, values)
        return values

    def leaf(index: Tensor) -> Tensor:
        with concrete_tensors():
            return draw(index)

    return leaf


def constant(node: Node, sizes: Sizes | None) -> bool:
    """Is every element of `node` determined by sizes alone, as for masks, identities and zeros?

    Without `sizes` any number that is computed from sizes will do.

    Uninitialised memory counts as constant, since it carries no data.
    """
    pending, seen = [node], set()
    while pending:
        at = pending.pop()
        if at in seen:
            continue
        seen.add(at)
        if not _is_tensor_like(at):
            try:
                if sizes is not None:
                    sizes.of(at)
            except Unsupported:
                return False
        elif at.op != "call_function" or (_rule_of(at) is None and at.target not in _TUPLES):
            return False
        elif at.target in aten.FILLS:  # a tensor argument lends its shape only
            pending += [n for n in at.all_input_nodes if not _is_tensor_like(n)]
        elif any(n.op != "call_function" and _is_tensor_like(n) for n in at.all_input_nodes):
            return False  # before any long way back to other inputs
        else:
            pending += at.all_input_nodes
    return True


def _rule_of(node: Node) -> Rule | None:
    if node.target is not operator.getitem:
        return _RULES.get(node.target)
    call, which = node.args
    if not isinstance(call, Node):
        return None
    return element_rules.view if call.target in aten.SPLITS else _RULES.get((call.target, which))


def _is_tensor_like(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


# SplitMix64 (Steele, Lea and Flood 2014), in wrapping int64 arithmetic
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(x: int) -> int:
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


def _mix_int(x: int) -> int:
    x = (x + 1) * 0x9E3779B97F4A7C15 & (2**64 - 1)
    x = (x ^ (x >> 30)) * _FACTORS[0] & (2**64 - 1)
    x = (x ^ (x >> 27)) * _FACTORS[1] & (2**64 - 1)
    return _signed(x ^ (x >> 31))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(_FACTORS[0])
    x = (x ^ _shifted(x, 27)) * _signed(_FACTORS[1])
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, places: int) -> Tensor:
    return (x >> places) & (2 ** (64 - places) - 1)  # the sign bit moves too
