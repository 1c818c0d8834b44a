"""One function per fusion in which it is found, of any number of tokens, for tests that concern all of them alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests import gates
from tests.patterns.chunk_delta_rule_spellings import per_head, scan
from tests.patterns.delta_rule_intra_spellings import SPELLINGS as SYSTEMS
from tests.patterns.delta_rule_intra_spellings import solved

E4 = torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Site:
    """A function with one site.

    Attributes:
        function: gives one tensor or several; may write to its arguments.
        shapes: of the arguments, with t for the number of tokens.
        symbolic: it is found with a symbolic number of tokens too.
        writes: to its first argument.
        trains: it is found where its arguments require gradients.
        draw: makes random numbers into arguments.
    """

    function: Callable[..., Any]
    shapes: tuple[tuple[int | str, ...], ...]
    symbolic: bool = True
    writes: bool = False
    trains: bool = False
    draw: Callable[[list[Tensor]], list[Tensor]] = list

    def inputs(self, tokens: int, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        sizes = [[tokens if n == "t" else int(n) for n in shape] for shape in self.shapes]
        return self.draw([torch.randn(size, generator=generator) for size in sizes])

    def marked(self, tokens: int, **bounds: int) -> list[Tensor]:
        """Arguments whose tokens are dynamic."""
        inputs = self.inputs(tokens)
        for tensor, shape in zip(inputs, self.shapes):
            for axis in [axis for axis, n in enumerate(shape) if n == "t"]:
                torch._dynamo.mark_dynamic(tensor, axis, **bounds)
        return inputs


def head_gate(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return functional.linear(x, weight) * 0.25 * scale


def index_score(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return ((q @ k.mT).relu() * w[..., None]).sum(1)


def mla_kv_pack(kv: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    windows = kv.unflatten(-1, (4, 32))
    key = torch.cat([windows[..., :16], pe.expand(-1, 4, -1)], -1)
    return key.to(E4), windows[..., 16:].to(E4)


def qkv_split(x: Tensor) -> list[Tensor]:
    return [part.contiguous() for part in x.split(32, -1)]


def redundant_copy(cache: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cache[:, :4] = k
    cache[:, 4:8] = v
    return cache * 2


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., :8].clone(), x[..., 8:].clone()
    x[..., :8] = a * cos - b * sin
    x[..., 8:] = b * cos + a * sin
    return x * 1


def full_topk(x: Tensor) -> Tensor:
    return torch.ones_like(x).scatter(-1, x.topk(12).indices, 0.0) + x


def topk_mask(x: Tensor) -> Tensor:
    return torch.ones_like(x).scatter(-1, x.topk(5).indices, 0.0) + x


def delta_rule_intra(rows: Tensor) -> Any:
    k, v, g, beta = rows.split([64, 96, 2, 2], -1)
    return SYSTEMS["solved_together"].function(k.unflatten(-1, (2, 32)), v.unflatten(-1, (2, 48)), g, beta, None)


def chunk_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    parts = per_head(q, k, v, g, beta, 16, solved)
    outputs, _ = scan(parts, torch.zeros(1, 2, 64, 64))
    return torch.cat(outputs, 2)[:, :, : q.shape[1]].transpose(1, 2)


def _rows(drawn: list[Tensor]) -> list[Tensor]:
    """Short keys, decays and a beta from 0 to 1, side by side."""
    k, v, g, beta = drawn[0].split([64, 96, 2, 2], -1)
    return [torch.cat([k / 6, v, -g.abs() / 5, beta.sigmoid()], -1)]


def _operands(drawn: list[Tensor]) -> list[Tensor]:
    q, k, v, g, beta = drawn
    return [q / 8, k / 8, v, -g.abs() / 5, beta.sigmoid()]


WIDE = (1, "t", 2, 64)
SITES: dict[str, Site] = {
    "gate_cumsum": Site(gates.gate, ((1, "t", 2, 32), (2,), (64,)), trains=True),
    "head_gate": Site(head_gate, (("t", 256), (8, 256), ("t", 8))),
    "index_score": Site(index_score, (("t", 8, 16), (24, 16), ("t", 8))),
    "mla_kv_pack": Site(mla_kv_pack, (("t", 128), ("t", 1, 8)), trains=True),
    "qkv_split": Site(qkv_split, (("t", 128),), trains=True),
    "redundant_copy": Site(redundant_copy, (("t", 24, 16), ("t", 4, 16), ("t", 4, 16)), writes=True),
    "rotate_pairs": Site(rotate_pairs, (("t", 3, 16), (3, 8), (3, 8)), writes=True),
    "full_topk": Site(full_topk, (("t", 12),), trains=True),
    "topk_mask": Site(topk_mask, (("t", 12),), trains=True),
    "delta_rule_intra": Site(delta_rule_intra, ((1, "t", 164),), draw=_rows),
    "chunk_delta_rule": Site(
        chunk_delta_rule, (WIDE, WIDE, WIDE, (1, "t", 2), (1, "t", 2)), symbolic=False, draw=_operands
    ),
}


def fusion_of(name: str) -> str:
    """The fusion that a site is of: rotations are a kind of copy that is left out."""
    return "redundant_copy" if name == "rotate_pairs" else name
