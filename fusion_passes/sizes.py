"""Admissible integers for the size symbols of a graph, found without adding a guard.

A graph traced with dynamic shapes speaks of sizes such as `s0 // 64`. To evaluate a part of it, every symbol needs
a number. `assignments` gives several: the sizes that were traced, and others that pass every guard recorded so far.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import Graph, Node

Number = int | float | bool
Env = dict[sympy.Symbol, sympy.Expr]

_SYMBOLIC: tuple[Any, ...] = (torch.SymInt, torch.SymFloat, torch.SymBool)
_DRAWS_PER_SYMBOL = 256
_POOL = 24  # admissible values kept per symbol
_JOINT_TRIES = 96
_STEPS = (1, 1, 2, 4, 8, 16, 32, 64, 128, 256)  # sizes are often asked to be multiples of these


class Unsupported(Exception):
    """Something cannot be evaluated or decided; the message names the node, the target or the symbol."""


class Sizes:
    """One assignment of integers to the size symbols of a graph.

    Args:
        symbols: a value for every backed symbol; symbols that are missing count as unknown.
    """

    def __init__(self, symbols: Env | None = None) -> None:
        self.symbols: Env = dict(symbols or {})
        self._memo: dict[sympy.Basic, sympy.Basic] = dict(self.symbols)
        self._shapes: dict[Node, tuple[int, ...]] = {}

    def __repr__(self) -> str:
        return f"Sizes({', '.join(f'{s}={v}' for s, v in sorted(self.symbols.items(), key=str))})"

    def of(self, x: Any) -> Any:
        """The plain number of a size: a number, a SymInt, SymFloat or SymBool, a node with such a value, or None.

        Raises:
            Unsupported: the size depends on data (an unbacked symbol), or `x` is not a size at all.
        """
        what = x.name if isinstance(x, Node) else x
        if isinstance(x, Node):
            if "val" not in x.meta:
                raise Unsupported(f"{x.name} has no recorded value")
            x = x.meta["val"]
        if x is None or isinstance(x, (bool, int, float)):
            return x
        if not isinstance(x, _SYMBOLIC):
            raise Unsupported(f"{what} is a {type(x).__name__}, not a size")
        expr = _expression(x)
        value = evaluate(expr, self._memo)
        if not _is_number(value):
            unknown = ", ".join(sorted(map(str, value.free_symbols))) or str(value)
            raise Unsupported(f"the size {expr} of {what} depends on data ({unknown} is not known)")
        return _plain(value)

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of a tensor-valued node."""
        if node not in self._shapes:
            self._shapes[node] = tuple(self.of(s) for s in _tensor(node).shape)
        return self._shapes[node]

    def strides(self, node: Node) -> tuple[int, ...]:
        """The strides, in elements, of a tensor-valued node."""
        return tuple(self.of(s) for s in _tensor(node).stride())

    def offset(self, node: Node) -> int:
        """The storage offset, in elements, of a tensor-valued node."""
        return int(self.of(_tensor(node).storage_offset()))

    def numel(self, node: Node) -> int:
        """The number of elements of a tensor-valued node."""
        return math.prod(self.shape(node))


def assignments(graph: Graph, count: int = 3, seed: int = 0) -> list[Sizes]:
    """Up to `count` assignments of the graph's size symbols: the traced sizes first, then other admissible ones.

    An assignment is admissible if it lies in the recorded value ranges, satisfies every recorded guard and
    replacement, and gives every shape in the graph a non-negative integer. Small sizes that differ from the traced
    ones are preferred. Guards are read, never added. Without symbols, or where no alternative is found in a bounded
    number of tries, the list holds one element.
    """
    expressions, shape_env = _graph_sizes(graph)
    if shape_env is None:
        return [Sizes()]
    constraints = _Constraints(shape_env, expressions)
    found = [Sizes(constraints.hints)]
    generator = random.Random(seed)
    pools = {s: constraints.pool(s, generator) for s in constraints.drawn}
    changeable = [s for s in constraints.drawn if pools[s]]
    seen = [{s: constraints.hints[s] for s in constraints.drawn}]
    for attempt in range(_JOINT_TRIES if changeable else 0):
        if len(found) >= count:
            break
        # first all symbols change at once, to distinct values where possible; later any subset will do
        some = changeable if attempt < _JOINT_TRIES // 2 else [s for s in changeable if generator.random() < 0.5]
        choice = {**seen[0], **{s: min(generator.choices(pools[s], k=3)) for s in some}}
        collides = attempt < _JOINT_TRIES // 4 and len(set(choice.values())) < len(choice)
        if choice in seen or collides:
            continue
        env = constraints.extend(choice)
        if constraints.admits(env):
            seen.append(choice)
            found.append(Sizes(env))
    return found


def evaluate(expr: sympy.Basic, memo: dict[sympy.Basic, sympy.Basic]) -> sympy.Basic:
    """`expr` with the symbols in `memo` replaced by their numbers; subexpressions are remembered in `memo`.

    Much cheaper than one `xreplace` per size, because the sizes of a graph share their nested floor divisions.
    """
    if expr in memo:
        return memo[expr]
    value = expr if not expr.args else expr.func(*(evaluate(a, memo) for a in expr.args))
    memo[expr] = value
    return value


class _Constraints:
    """What a ShapeEnv demands of its symbols, as far as the expressions of a graph are concerned."""

    def __init__(self, shape_env: Any, expressions: Sequence[sympy.Expr]) -> None:
        hints = getattr(shape_env, "backed_var_to_val", None)
        self.hints: Env = dict(shape_env.var_to_val if hints is None else hints)
        self.ranges = shape_env.var_to_range
        self.replacements: Env = dict(shape_env.replacements)
        self.expressions = list(expressions)
        guards = (g.expr for g in shape_env.guards)
        self.guards = list(dict.fromkeys(g for g in guards if isinstance(g, sympy.Basic)))
        self.guards += [sympy.Eq(e, 0, evaluate=False) for e in getattr(shape_env, "divisible", ())]
        free = {s for e in self.expressions for s in e.free_symbols}
        self.drawn = sorted((s for s in free if s in self.hints and s not in self.replacements), key=str)

    def extend(self, choice: Env) -> Env:
        """The values of all backed symbols: the chosen ones, the hints of the others, and what follows from both."""
        env = {**self.hints, **choice}
        for symbol in self.replacements:
            value = self._replaced(symbol, env)
            if _is_number(value):
                env[symbol] = value
        return env

    def _replaced(self, symbol: sympy.Symbol, env: Env) -> sympy.Expr:
        value: sympy.Expr = symbol
        for _ in range(8):  # a replacement may mention symbols that are replaced in turn
            chained = {s: self.replacements[s] for s in value.free_symbols if s in self.replacements}
            if not chained:
                break
            value = value.xreplace(chained)
        return value.xreplace(env)

    def admits(self, env: Env) -> bool:
        """Does the full assignment pass every range, guard and shape?"""
        if not all(self._in_range(s, v) for s, v in env.items()):
            return False
        memo: dict[sympy.Basic, sympy.Basic] = dict(env)
        return all(_passes(_holds, g, memo) for g in self.guards) and all(
            _passes(_is_size, e, memo) for e in self.expressions
        )

    def pool(self, symbol: sympy.Symbol, generator: random.Random) -> list[sympy.Expr]:
        """Values other than the hint that pass the range and the guards on this symbol alone, small ones first."""
        hint = self.hints[symbol]
        if not hint.is_Integer:
            return []
        alone = [g for g in self.guards if g.free_symbols == {symbol}]
        pool: list[sympy.Expr] = []
        for value in dict.fromkeys(self._candidates(symbol, int(hint), generator)):
            number = sympy.Integer(value)
            if value == int(hint) or not self._in_range(symbol, number):
                continue
            memo: dict[sympy.Basic, sympy.Basic] = {symbol: number}
            if all(_passes(_holds, g, memo) for g in alone):
                pool.append(number)
            if len(pool) == 2 * _POOL:
                break
        # half small values, half any
        pool.sort()
        rest = pool[_POOL // 2 :]
        return pool[: _POOL // 2] + generator.sample(rest, min(len(rest), _POOL // 2))

    def _candidates(self, symbol: sympy.Symbol, hint: int, generator: random.Random) -> Iterator[int]:
        bounds = self.ranges.get(symbol)
        low = max(2, _finite(bounds.lower, 2)) if bounds is not None else 2
        high = max(low, min(_finite(bounds.upper, 4 * hint), 4 * hint) if bounds is not None else 4 * hint)
        yield from (low, low + 1, hint - 1, hint + 1, hint // 2, 2 * hint)
        for _ in range(_DRAWS_PER_SYMBOL):
            step = generator.choice(_STEPS)
            top = generator.choice((high, min(high, hint + 16), min(high, low + 16 * step)))
            bottom = generator.choice((low, max(low, hint - 16)))
            yield step * generator.randint(-(-bottom // step), max(-(-bottom // step), top // step))

    def _in_range(self, symbol: sympy.Symbol, value: sympy.Expr) -> bool:
        bounds = self.ranges.get(symbol)
        return bounds is None or not _is_number(value) or bool(bounds.lower <= value) and bool(value <= bounds.upper)


def _graph_sizes(graph: Graph) -> tuple[list[sympy.Expr], Any]:
    """The distinct symbolic sizes of the tensors in a graph, and the ShapeEnv they belong to."""
    expressions: dict[sympy.Expr, None] = {}
    shape_env: Any = None
    value: Any
    symbolic: Any
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, _SYMBOLIC):
            shape_env = shape_env or value.node.shape_env
        for tensor in _tensors(value):
            for symbolic in tensor.shape:
                if isinstance(symbolic, _SYMBOLIC):
                    expr = _expression(symbolic)
                    if expr.free_symbols:
                        shape_env = shape_env or symbolic.node.shape_env
                        expressions[expr] = None
    return list(expressions), shape_env


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _expression(x: Any) -> sympy.Basic:
    try:
        expr = x.node.expr
    except AttributeError as error:
        raise Unsupported(f"the size {x} has no expression") from error
    return expr if isinstance(expr, sympy.Basic) else sympy.sympify(expr)


def _tensor(node: Node) -> torch.Tensor:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise Unsupported(f"{node.name} ({node.target}) is not a tensor")
    return value


@functools.lru_cache(maxsize=4096)
def _is_number(value: sympy.Basic) -> bool:
    return value in (sympy.true, sympy.false) or bool(getattr(value, "is_number", False))


def _plain(value: sympy.Basic) -> Number:
    if value in (sympy.true, sympy.false):
        return value == sympy.true
    return float(value) if isinstance(value, sympy.Float) or not value.is_integer else int(value)


def _passes(test: Callable[[sympy.Basic], bool], expr: sympy.Basic, memo: dict[sympy.Basic, sympy.Basic]) -> bool:
    try:
        return test(evaluate(expr, memo))
    except ZeroDivisionError:  # such as T % (s // 64) for s below 64
        return False


def _holds(value: sympy.Basic) -> bool:
    """A guard holds unless it is decided and false; one about data is checked when the program runs."""
    return bool(value == sympy.true) if _is_number(value) else True


def _is_size(value: sympy.Basic) -> bool:
    return not _is_number(value) or bool(value.is_integer and value >= 0)


def _finite(bound: sympy.Expr, otherwise: int) -> int:
    return int(bound) if bound.is_Integer else otherwise
