"""The declaration of a fusion: the one type that a contributor has to know.

A fusion names rare *anchors* to start from, a `match` that proves what the subgraph around an anchor computes,
a `guard` (may it be replaced?), a `profit` rule (should it be?) and a `replace` that builds the fused call.
Each of them answers with a reason in words when the answer is no; nothing is decided by a bare boolean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from fusion_passes.settings import Settings
from fusion_passes.sizes import Sizes

# A reason in words why something is not done, or None where nothing stands against it.
Reason = str | None


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as reasons and errors name it: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


class Because(str):
    """A reason with a hint: what would make the site match. `guard` and `profit` may return one.

    Attributes:
        hint: what the author of the model, or the caller, can do about it.
    """

    hint: str

    def __new__(cls, reason: str, hint: str = "") -> Because:
        made = super().__new__(cls, reason)
        made.hint = hint
        return made


class _Reasoned(Exception):
    """An exception whose message is a reason, a `Because` where there is a hint.

    Args:
        reason: the message; one that has a hint keeps it.
        hint: what would help, where the author of the model or the caller can do something about it.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(Because(reason, hint) if hint else reason)


class NearMiss(_Reasoned):
    """The subgraph at an anchor is not what the fusion computes; the message says where the likeness ends."""


class Refusal(_Reasoned):
    """The subgraph means what the fusion computes but must not be replaced; the message says why."""


@dataclasses.dataclass
class Context:
    """What a fusion may know about the graph it looks at.

    Attributes:
        graph: the post-grad ATen graph; not to be changed before `replace`.
        settings: the snapshot of the configuration for this compile.
        sizes: admissible assignments of integers to the graph's size symbols, the hints first. A match must
            hold under every one of them.
        memo: what a fusion wants to remember about the graph; emptied when a site was fused.
    """

    graph: Graph
    settings: Settings
    sizes: list[Sizes]
    memo: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Site:
    """One place in a graph that a fusion matched.

    Attributes:
        anchor: the node the search started from.
        replaced: the node whose value the fused op will provide.
        also: further nodes whose values the same fused op provides, in the order in which `replace` returns them.
        leaves: the tensors that the fused op reads, by operand name.
        interior: nodes whose work the fused op takes over; none of their large values may be needed elsewhere.
        params: whatever `replace` needs beside the leaves.
        roundings: casts to a narrower float inside `interior` that the fused op does not perform.
        shared: nodes of `interior` that others may need as well: the graph goes on computing them.
        summary: shapes and constants in words, for the report.
        saved_bytes: memory traffic saved per call, estimated at the size hints; None if not estimated.
        saved_launches: kernel launches saved per call, estimated; None if not estimated.
        rewrite: changes the graph itself, in place of the fusion's `replace`, where writes to memory have to be put
            in order. It has to leave the graph as it was if it raises. Where it calls a kernel it does what `verify`
            asks for itself, with `verify.check_in_place`.
    """

    anchor: Node
    replaced: Node
    leaves: dict[str, Node]
    interior: set[Node]
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    roundings: list[Node] = dataclasses.field(default_factory=list)
    summary: str = ""
    saved_bytes: int | None = None
    saved_launches: int | None = None
    also: tuple[Node, ...] = ()
    shared: frozenset[Node] = frozenset()
    rewrite: Callable[[], None] | None = None

    @property
    def outputs(self) -> tuple[Node, ...]:
        """Every node whose value the fused op will provide."""
        return (self.replaced, *self.also)


def _always(site: Site, context: Context) -> Reason:
    return None


def _any(anchor: Node) -> bool:
    return True


def _as_drawn(name: str, values: torch.Tensor) -> torch.Tensor:
    return values


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Everything the pass needs to know about one fusion.

    Attributes:
        name: the name in options and reports, and of the op in `torch.ops.fusion_passes`.
        doc: one line for `python -m fusion_passes list`.
        anchors: ATen overloads that start a search; rare ones, so that a graph without them costs nothing.
        match: proves the meaning of the subgraph at an anchor and returns a Site, None if the anchor is of no
            interest at all, or raises `NearMiss` with the reason.
        replace: builds the fused call beside the old nodes and returns the node that takes the place of
            `site.replaced`, with the same shape, strides and dtype; a sequence of them, one for each of
            `site.outputs`, where there are several. New nodes go before the insertion point that the caller has
            set, which all leaves precede.
        guard: why the site must be left alone although it matches, or None.
        profit: why replacing it would not pay, or None.
        wants: a cheap look at an anchor: False where it is of no interest at all, such as a cast to another dtype.
            Nothing is recorded of such anchors, whatever their device.
        dtypes: floating dtypes that the leaves may have.
        absorbs: names of fusions that are part of this one and are not attempted on what it has taken.
        default: whether "default" in the `fusions` setting includes it.
        tolerance: relative error (L2 norm) that `verify` allows between the subgraph and the fused op.
        draw: what an operand holds when `verify` runs, made of its name and of normal random numbers with its shape,
            strides and dtype; those numbers unless given.
        sources: functions whose files the compile caches have to know as well, beside that of `match`.
    """

    name: str
    doc: str
    anchors: tuple[torch._ops.OpOverload, ...]
    match: Callable[[Node, Context], Site | None]
    replace: Callable[[Site, Graph], Node | Sequence[Node]]
    guard: Callable[[Site, Context], Reason] = _always
    profit: Callable[[Site, Context], Reason] = _always
    wants: Callable[[Node], bool] = _any
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    absorbs: tuple[str, ...] = ()
    default: bool = True
    tolerance: float = 1e-5
    draw: Callable[[str, torch.Tensor], torch.Tensor] = _as_drawn
    sources: tuple[Callable[..., Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a fusion's name must be an identifier, got {self.name!r}")
        if not self.anchors:
            raise ValueError(f"fusion {self.name!r} names no anchors: give at least one ATen overload to start from")
        for anchor in self.anchors:
            if not isinstance(anchor, torch._ops.OpOverload):
                raise TypeError(
                    f"fusion {self.name!r}: anchors must be overloads such as torch.ops.aten.cumsum.default, "
                    f"got {anchor!r}"
                )
