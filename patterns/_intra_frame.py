"""The batches, heads and chunks that sums of log decays are about, told from their shape and from what is summed up."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.patterns._axis_factors import CHUNKS, PLAIN, Factor, Layout
from fusion_passes.sizes import Sizes
from fusion_passes.views import axis_of

# Orders of the axes: b batch, h head, n chunk, c token in its chunk; what is missing has length one.
ORDERS = ("bhnc", "bnhc", "bnch", "hnc", "nhc", "nch", "bhc", "bch", "hc", "nc", "ch")
_MOST_SOURCES = 64


@dataclasses.dataclass(frozen=True)
class Frame:
    """What one sum per token is about.

    Attributes:
        sums: the node, cumulative log decays within chunks.
        order: the axes of `sums` as letters, k for channels at the end.
        size: the size of every letter, 1 for those that are missing; t for tokens without padding.
    """

    sums: Node
    order: str
    size: dict[str, int]

    @property
    def per_channel(self) -> bool:
        return "k" in self.order

    @property
    def problems(self) -> int:
        """Chunks of all batches and heads."""
        return self.size["b"] * self.size["h"] * self.size["n"]

    def layout(self, groups: int) -> Layout:
        """The axes of `sums` by name, for a number of key heads."""
        size = self.size
        dims = {
            "b": (Factor("b", size["b"]),),
            "h": (Factor("g", groups), Factor("r", size["h"] // groups)),
            "n": (Factor(CHUNKS, size["n"]),),
            "c": (Factor(PLAIN, size["c"]),),
            "k": (Factor(PLAIN, size["k"]),),
        }
        return tuple(dims[letter] for letter in self.order)


def frames(sums: Node, sizes: Sizes) -> Iterator[Frame]:
    """What a cumulative sum may be about; which it is shows when its operands are found."""
    shape = sizes.shape(sums)
    axis = axis_of(int(semantics.arguments(sums)["dim"]), len(shape))
    for order in (letters + channel for letters in ORDERS for channel in ("", "k")):
        if len(order) != len(shape) or order.index("c") != axis:
            continue
        size = {**dict.fromkeys("bhnck", 1), **dict(zip(order, shape))}
        if size["k"] == 1 and "k" in order:
            continue
        for tokens in _tokens(sums, size, sizes):
            yield Frame(sums, order, {**size, "t": tokens})


def _tokens(sums: Node, size: dict[str, int], sizes: Sizes) -> list[int]:
    """Lengths of the sequence before it was padded and divided, the shortest first."""
    padded = size["n"] * size["c"]
    found: set[int] = set()
    queue = [sums]
    for node in itertools.islice(iter(queue), _MOST_SOURCES):
        for source in node.all_input_nodes:
            value = source.meta.get("val")
            if not isinstance(value, torch.Tensor) or source in queue:
                continue
            queue.append(source)
            shape = sizes.shape(source)
            rest = (size["k"],) if size["k"] > 1 else ()
            if len(shape) < 3 or shape[0] != size["b"] or tuple(shape[3:]) != rest:
                continue
            for heads, tokens in (shape[1:3], shape[2:0:-1]):
                if heads == size["h"] and padded - size["c"] < tokens <= padded:
                    found.add(tokens)
    return sorted(found) or [padded]
