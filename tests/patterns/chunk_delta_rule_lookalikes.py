"""Functions that resemble the chunked delta rule and are something else, each with a part of the reason that is given.

They share one loop, `rule`, in which a single place is changed by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.patterns.chunk_delta_rule_spellings import chunked, decays, heads_first, lower, zeros

Change = Callable[..., Any]
CHUNK = 16
TOKENS = 64


def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **changes: Change) -> Any:
    """The delta rule, one decay per head, in chunks of 16; `changes` act on the value that they are named after."""

    def at(name: str, value: Any, *more: Any) -> Any:
        return changes[name](value, *more) if name in changes else value

    q, k, v, g, beta = at("heads_first", heads_first(q, k, v, g, beta))
    q, k, v, g, beta = (chunked(t, CHUNK) for t in (q, k, v, g, beta))
    q, k, v, g, beta = at("chunks", (q, k, v, g, beta))
    sums = at("sums", g.cumsum(-1), g)
    between = at("between", decays(sums))
    system = at("system", ((k * beta[..., None]) @ k.mT * between).tril(-1))
    right = at("right", torch.cat([v * beta[..., None], k * (beta * sums.exp())[..., None]], -1), v, k, beta)
    u, w = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split([64, 64], -1)
    within = at("within", q @ k.mT * between)
    state, outputs = at("start", zeros(q, v)), []
    seen: list[Tensor] = []
    for i in range(q.shape[2]):
        state = at("state", state, i, seen)
        seen.append(state)
        written = u[:, :, i] - w[:, :, i] @ state
        read = q[:, :, i] * sums[:, :, i, :, None].exp()
        outputs.append(at("output", read @ state + within[:, :, at("which", i)] @ written, i, written))
        last = sums[:, :, i, -1:]
        decayed = at("decayed", last.exp()[..., None], i) * state
        state = decayed + (k[:, :, i] * (last - sums[:, :, i]).exp()[..., None]).mT @ written
    outputs = at("outputs", outputs)
    result = torch.stack(outputs, 2).flatten(2, 3)[:, :, :TOKENS].transpose(1, 2).contiguous()
    return at("result", result, state, outputs, u)


def _third(factor: float) -> Change:
    return lambda value, i, *more: value * factor if i == 2 else value


def _masked(mask: Callable[[Tensor], Tensor]) -> Change:
    return lambda value, *more: torch.where(mask(value), value, 1.01 * value)


def _with_chunks(**changed: Change) -> Change:
    """A change of some of the chunked operands."""

    def change(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(changed[n](t) if n in changed else t for n, t in zip(("q", "k", "v", "g", "beta"), parts))

    return change


def _unit(eps: float) -> Change:
    return lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def _normaliser() -> dict[str, Change]:
    """A second thing that is handed on from chunk to chunk."""
    total: list[Any] = [1.0]

    def output(value: Tensor, i: int, written: Tensor) -> Tensor:
        value = value + total[0] * 1e-3
        total[0] = written.sum((-1, -2), keepdim=True)
        return value

    def start(state: Tensor) -> Tensor:
        total[0] = 1.0
        return state

    return {"output": output, "start": start}


def _axis(position: int, rank: int) -> Callable[[Tensor], Tensor]:
    """True but for one position of an axis."""

    def mask(value: Tensor) -> Tensor:
        shape = [1] * rank
        shape[position] = -1
        return (torch.arange(value.shape[position]) != 1).view(shape)

    return mask


CHANGES: dict[str, tuple[dict[str, Change], str]] = {
    "chunks_in_another_order": ({"outputs": lambda o: [o[1], o[0], *o[2:]]}, "does not hold those of chunk 0"),
    "one_chunk_twice": ({"outputs": lambda o: [o[0], o[1], o[1], o[3]]}, "does not hold those of chunk 2"),
    "products_of_another_chunk": ({"which": lambda i: 1 if i == 2 else i}, "a delta rule hands on one state"),
    "one_chunk_decays_less": ({"decayed": _third(1.01)}, "chunk 2 is not computed by the rule"),
    "one_chunk_starts_from_half": ({"state": _third(0.5)}, "chunk 1 is not computed by the rule"),
    "state_before_the_last": (
        {"state": lambda state, i, seen: seen[1] if i == 3 else state}, "not from the one after chunk 2"
    ),
    "one_chunk_starts_anew": ({"state": lambda state, i, seen: state.new_zeros(state.shape) if i == 2 else state},
                              "chunk 2 uses nothing of earlier chunks"),  # fmt: skip
    "two_states": (_normaliser(), "a delta rule hands on one state"),
    "one_output_is_larger": ({"output": _third(1.01)}, "chunk 2 is not computed by the rule"),
    "w_without_decay": ({"right": lambda right, v, k, beta: torch.cat([v * beta[..., None], k * beta[..., None]], -1)},
                        "chunk 1 is not computed by the rule"),  # fmt: skip
    "beta_on_keys_alone": ({"right": lambda right, v, k, beta: torch.cat([v, right[..., 64:]], -1)},
                           "is no step of a delta rule"),  # fmt: skip
    "diagonal_left_out": ({"within": lambda a: a.tril(-1)}, "is no step of a delta rule"),
    "a_future_token": (
        {"within": lambda a: a + 1e-3 * torch.ones(CHUNK, CHUNK).triu(1).tril(1)}, "is no step of a delta rule"
    ),
    "one_entry_masked": (
        {"output": lambda o, *more: torch.where(torch.arange(CHUNK * 64).view(CHUNK, 64) == 7 * 64 + 5, 1.01 * o, o)},
        "is no step of a delta rule",
    ),
    "linear_attention": ({"system": torch.zeros_like}, "is no step of a delta rule"),
    "one_chunk_by_mask": ({"between": _masked(_axis(2, 5))}, "depend on the position of the chunk itself"),
    "one_head_by_mask": ({"between": _masked(_axis(1, 5))}, "depend on the position of the head itself"),
    "one_batch_by_mask": ({"between": _masked(_axis(0, 5))}, "depend on the position of the batch itself"),
    "one_token_by_mask": (
        {"heads_first": lambda t: [*t[:3], _masked(lambda g: torch.arange(TOKENS) != 37)(t[3]), t[4]]},
        "depend on the position of the token itself",
    ),
    "heads_rolled": ({"chunks": _with_chunks(q=lambda x: x.roll(1, 1))}, "which has no row per token and head"),
    "heads_in_reverse": ({"chunks": _with_chunks(k=lambda x: x.flip(1))}, "adds up over the axis of the head"),
    "chunks_put_together": (
        {"chunks": _with_chunks(k=lambda x: torch.cat([x[:, :, :2] * 1.01, x[:, :, 2:]], 2))},
        "of the axis of the chunk",
    ),
    "one_chunk_overwritten": (
        {"chunks": _with_chunks(k=lambda x: x.select_scatter(x[:, :, 0], 2, 1))},
        "writes to some batches, heads or chunks only",
    ),
    "sums_over_the_sequence": (
        {"sums": lambda s, g: g.flatten(2).cumsum(-1).unflatten(2, (-1, CHUNK))}, "adds up over the axis of the"
    ),
    "decay_is_clamped": ({"chunks": _with_chunks(g=lambda g: g.clamp(min=-50.0))}, "is no part of a delta rule"),
    "decay_by_its_value": (
        {"chunks": _with_chunks(g=lambda g: torch.where(g < -60, 0.0, g))}, "is no part of a delta rule"
    ),
    "beta_rounded": ({"chunks": _with_chunks(beta=torch.round)}, "is no part of a delta rule"),
    "beta_without_its_sign": (
        {"chunks": _with_chunks(beta=lambda b: (b * b).sqrt())}, "is of something else than in a delta rule"
    ),
    "values_hidden_far_away": (
        {"chunks": _with_chunks(v=lambda v: v * torch.sigmoid(1e4 * (v + 3)))},
        "is of something else than in a delta rule",
    ),
    "epsilon_beside_the_root": (
        {"chunks": _with_chunks(q=(unit := lambda x: x / ((x * x).sum(-1, keepdim=True).sqrt() + 1e-6)), k=unit)},
        "is no step of a delta rule",
    ),
    "two_epsilons": ({"chunks": _with_chunks(q=_unit(1e-6), k=_unit(1e-5))}, "is no step of a delta rule"),
    "only_keys_normalised": ({"chunks": _with_chunks(k=_unit(1e-6))}, "is no step of a delta rule"),
    "bfloat16_products": (
        {"within": lambda a: a.bfloat16().float(), "output": lambda o, i, w: (o.bfloat16() @ torch.eye(64).bfloat16())},
        "is rounded to bfloat16 around a sum or matrix product",
    ),
    "float64_inside": ({"sums": lambda s, g: g.double().cumsum(-1).float()}, "is computed in float64"),
    "written_values_returned": ({"result": lambda result, state, outputs, u: (result, u)}, "is returned by the graph"),
    "output_of_a_chunk_used": (
        {"result": lambda result, state, outputs, u: (result, outputs[1].sin())}, "is used elsewhere"
    ),
}  # fmt: skip


def changed(name: str) -> Callable[..., Any]:
    """The loop with the change of that name."""
    changes, _ = CHANGES[name]

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        return rule(q, k, v, g, beta, **changes)

    return run


def without_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The delta rule without a gate; it still has exponentials, of constants."""
    q, k, v, beta = (chunked(t, CHUNK) for t in heads_first(q, k, v, beta))
    system = ((k * beta[..., None]) @ k.mT).tril(-1)
    right = torch.cat([v * beta[..., None], k * beta[..., None]], -1)
    u, w = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split([64, 64], -1)
    state, outputs = zeros(q, v), []
    for i in range(q.shape[2]):
        written = u[:, :, i] - w[:, :, i] @ state
        weights = torch.where(lower(CHUNK), 0.0, -math.inf).exp()
        outputs.append(q[:, :, i] @ state + (q[:, :, i] @ k[:, :, i].mT * weights) @ written)
        state = state + k[:, :, i].mT @ written
    return torch.stack(outputs, 2).flatten(2, 3).transpose(1, 2)
