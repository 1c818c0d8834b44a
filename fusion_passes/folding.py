"""Folds a part of a graph to as many groups as a reader can take in.

In order, until few enough are left: views go (their readers then read what they show), the steps of unrolled loops
become one group, as do operators in a row, and at last all between those and the ends. What a fold takes together is an
interval of an order in which sources come first, so that no two groups read each other.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

from torch.fx import Node

from fusion_passes import aten

# Groups that are drawn at most, but for those of inputs and results.
MOST = 18
# A loop's step has at most so many operators, and is repeated at least so often.
LONGEST_STEP, LEAST_STEPS = 200, 2
# Shorter runs are no loops, and shorter rows are drawn as they are.
LEAST_RUN, LEAST_ROW = 8, 3
# Groups that stay at either end when all between them is folded.
ENDS = 3

_VIEWS = aten.VIEWS - aten.PADS


@dataclasses.dataclass(frozen=True)
class Group:
    """Nodes that are drawn as one box.

    Attributes:
        nodes: in graph order.
        repeats: how often the same operators come again, in an unrolled loop for example; else 0.
        in_a_row: each reads the one before, and nothing else does.
    """

    nodes: tuple[Node, ...]
    repeats: int = 0
    in_a_row: bool = False


def fold(nodes: Sequence[Node]) -> list[Group]:
    """Groups of `nodes`, which are in graph order; about `MOST` of them at most.

    A node of no group is a view or a copy of its first source, and is not drawn.
    """
    groups = [Group((node,)) for node in nodes]
    for step in (_without_views, _loops, _rows, _stretches):
        if len(groups) <= MOST:
            break
        groups = step(groups)
    return groups


def is_view(node: Node) -> bool:
    """Does `node` only rename the elements of its source, or take one of several results?"""
    return node.target in _VIEWS or node.target is operator.getitem


def _is_hidden(node: Node) -> bool:
    return (is_view(node) or node.target in aten.COPIES) and bool(node.all_input_nodes)


def _without_views(groups: list[Group]) -> list[Group]:
    """Readers of a view read what it shows."""
    return [group for group in groups if not _is_hidden(group.nodes[0])] or groups


def _loops(groups: list[Group]) -> list[Group]:
    """Runs in which the same operators come again and again."""
    kinds = [tuple(node.target for node in group.nodes) for group in groups]
    folded: list[Group] = []
    at = 0
    while at < len(kinds):
        length, step = _longest_run(kinds, at)
        if length:
            folded.append(_joined(groups[at : at + length], repeats=length // step))
        else:
            folded.append(groups[at])
        at += length or 1
    return folded


def _longest_run(kinds: Sequence[object], start: int) -> tuple[int, int]:
    """Length and step of the longest repetition that starts here, of the shortest step; (0, 0) if there is none."""
    best = (0, 0)
    for step in range(1, min(LONGEST_STEP, (len(kinds) - start) // LEAST_STEPS) + 1):
        if kinds[start] != kinds[start + step]:
            continue
        end = start + step
        while end < len(kinds) and kinds[end] == kinds[end - step]:
            end += 1
        length = (end - start) // step * step
        if length >= max(LEAST_RUN, LEAST_STEPS * step) and length > best[0]:
            best = (length, step)
    return best


def _rows(groups: list[Group]) -> list[Group]:
    """Operators in a row, each of which is read by the next alone."""
    readers, sources = _neighbours(groups)
    rows: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        before = next(iter(sources[i])) if len(sources[i]) == 1 else None
        plain = len(group.nodes) == 1 and not group.repeats
        if plain and before in rows and len(readers[before]) == 1:
            rows[i] = rows[before]
            rows[i].append(i)
        elif plain:
            rows[i] = [i]
    folded = []
    for i, group in enumerate(groups):
        row = rows.get(i, [i])
        if len(row) < LEAST_ROW:
            folded.append(group)
        elif row[-1] == i:
            folded.append(_joined([groups[j] for j in row], in_a_row=True))
    return folded


def _stretches(groups: list[Group]) -> list[Group]:
    """What lies between the first and last groups and the repetitions: one group for each stretch of it."""
    folded: list[Group] = []
    stretch: list[Group] = []
    for i, group in enumerate(groups):
        if ENDS <= i < len(groups) - ENDS and not group.repeats:
            stretch.append(group)
            continue
        folded += [_joined(stretch), group] if stretch else [group]
        stretch = []
    return folded


def _neighbours(groups: Sequence[Group]) -> tuple[list[set[int]], list[set[int]]]:
    """Readers and sources of each group."""
    home = {node: i for i, group in enumerate(groups) for node in group.nodes}
    readers: list[set[int]] = [set() for _ in groups]
    sources: list[set[int]] = [set() for _ in groups]
    for node, i in home.items():
        for source in node.all_input_nodes:
            while source not in home and _is_hidden(source):
                source = source.all_input_nodes[0]
            j = home.get(source, i)
            if j != i:
                sources[i].add(j)
                readers[j].add(i)
    return readers, sources


def _joined(groups: Sequence[Group], repeats: int = 0, in_a_row: bool = False) -> Group:
    return Group(tuple(sorted(node for group in groups for node in group.nodes)), repeats, in_a_row)
