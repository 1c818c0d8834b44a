"""Gates, scores and delta rules that are left alone, and what helps."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns import chunk_delta_rule_lookalikes, delta_rule_intra_spellings
from tests.patterns import index_score_lookalikes as index
from tests.patterns.chunk_delta_rule_spellings import SPELLINGS as RULES
from tests.patterns.hints_cases import BF16, F32, F64, STATIC, Call, Table, draw, entry, marked
from tests.patterns.index_score_cases import D, T, qkw
from tests.support import delta_rule

CASES: Table = {}
case = functools.partial(entry, CASES)

# --- gate_cumsum -----------------------------------------------------------------------------------------------------


def gate(raw: Tensor, a_log: Tensor) -> Tensor:
    return -a_log.exp()[:, None] * F.softplus(raw)


def chunks(length: int, dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    return lambda raw, a_log: gate(raw, a_log).unflatten(1, (-1, length)).cumsum(2, dtype=dtype)


def beside(g: Tensor, use: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    return use(g), g.unflatten(1, (-1, 64)).cumsum(2)


RAW = draw((2, 192, 2, 32), (2,))
GOOD = Call(chunks(64), RAW)

case(
    "gate_cumsum: chunk length",
    Call(chunks(48), RAW),
    "an axis of 48; the kernel has chunks of 16, 32, 64, 128", "into chunks of one of these lengths", GOOD,
)  # fmt: skip
case(
    "gate_cumsum: whole sequence",
    Call(lambda raw, a_log: gate(raw, a_log).cumsum(1), draw((2, 64, 2, 32), (2,))),
    "over the whole sequence of 64", "unflatten its tokens into chunks of 16, 32, 64 or 128",
    Call(chunks(64), draw((2, 64, 2, 32), (2,))),
)  # fmt: skip
case(
    "gate_cumsum: dtype of the sums",
    Call(chunks(64), draw((2, 192, 2, 32), (2,), dtype=BF16)),
    "accumulates in bfloat16", "dtype=torch.float32", Call(chunks(64, F32), draw((2, 192, 2, 32), (2,), dtype=BF16)),
)  # fmt: skip
case(
    "gate_cumsum: dtype of an operand",
    Call(chunks(64, F32), draw((2, 192, 2, 32), (2,), dtype=F64)),
    "raw is float64", "hand raw over in bfloat16, float16 or float32:", GOOD,
)  # fmt: skip
case(
    "gate_cumsum: symbolic heads",
    Call(chunks(64), lambda: (*marked(draw((2, 192, 2, 32)), 2)(), *marked(draw((2,)), 0)())),
    "number of heads is symbolic", STATIC, GOOD,
)  # fmt: skip
case(
    "gate_cumsum: intermediate used",
    Call(lambda raw, a_log: beside(gate(raw, a_log), lambda g: g + 1), RAW),
    "is used elsewhere", "have that use read what the fusion reads or returns",
    Call(lambda raw, a_log: (raw + 1, chunks(64)(raw, a_log)), RAW),
)  # fmt: skip
case(
    "gate_cumsum: intermediate returned",
    Call(lambda raw, a_log: beside(gate(raw, a_log), lambda g: g), RAW),
    "is returned by the graph", "do not return it, and call the model under torch.no_grad()", GOOD,
)  # fmt: skip
case(
    "gate_cumsum: computed input",
    Call(lambda raw, a_log: chunks(64)(raw.relu(), a_log), RAW),
    "computed by a pointwise node", "always_profitable",
    Call(lambda raw, a_log: chunks(64)(raw.relu(), a_log), RAW, {"always_profitable": True}),
)  # fmt: skip

# --- head_gate -------------------------------------------------------------------------------------------------------


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) * 0.5


def with_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    product = F.linear(x, weight)
    return product, product.float() * 0.5


def by_rows(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) * (1 / x.shape[0])


ROWS = Call(scaled, draw((150, 256), (8, 256), dtype=BF16))

case(
    "head_gate: columns apart",
    Call(lambda x, weight: scaled(x.mT, weight), draw((256, 150), (8, 256), dtype=BF16)),
    "lie 150 elements apart", "lay out x with neighbouring columns next to each other", ROWS,
)  # fmt: skip
case(
    "head_gate: product returned",
    Call(with_product, ROWS.inputs), "is returned by the graph", "do not return it", ROWS,
)  # fmt: skip
case(
    "head_gate: size as a factor",
    Call(by_rows, lambda: (*marked(draw((150, 256), dtype=BF16), 0)(), torch.randn(8, 256).to(BF16))),
    "depends on a size that is symbolic", STATIC, Call(by_rows, ROWS.inputs),
)  # fmt: skip

# --- index_score -----------------------------------------------------------------------------------------------------


def best(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return index.scores(q, k, w).topk(3).values


def double_weights() -> tuple[Tensor, ...]:
    q, k, w = qkw()()
    return q, k, w.double()


case(
    "index_score: width",
    Call(best, qkw(width=12)),
    "have 12 channels", "pad q and k with zeros to 16 channels",
    Call(best, lambda: tuple(F.pad(t, (0, 4)) if t.shape[-1] == 12 else t for t in qkw(width=12)())),
)  # fmt: skip
case("index_score: no such width", Call(best, qkw(width=264)), "have 264 channels", "", None)
case(
    "index_score: channels apart",
    Call(lambda q, k, w: best(q, k.T, w), lambda: (qkw()()[0], torch.randn(D, T).bfloat16(), qkw()()[2])),
    "elements apart in memory", "lay out k with neighbouring channels next to each other", Call(best, qkw()),
)  # fmt: skip
case(
    "index_score: dtype of the weights",
    Call(best, double_weights),
    "w is float64", "hand w over in bfloat16, float16 or float32:", Call(best, qkw()),
)  # fmt: skip
case(
    "index_score: gradients",
    Call(best, lambda: tuple(t.float().requires_grad_() for t in qkw()())),
    "saved for the backward pass", "call the model under torch.no_grad()", Call(torch.no_grad()(best), qkw(dtype=F32)),
)  # fmt: skip

# --- delta rules -----------------------------------------------------------------------------------------------------


def operands(names: str, key: int, value: int, padded: int = 0) -> Callable[[], tuple[Tensor, ...]]:
    """Operands in the order of the spellings, their keys padded."""

    def make() -> tuple[Tensor, ...]:
        found = delta_rule.operands(1, 128, 2, 2, key, value)
        found |= {name: F.pad(found[name], (0, padded)) for name in "qk"}
        return tuple(found[name] for name in names.split())

    return make


systems = functools.partial(delta_rule_intra_spellings.inverted, delta_rule_intra_spellings.solved)
SYSTEMS = functools.partial(operands, "k v g beta q")
RULE = functools.partial(operands, "q k v g beta")
WHOLE = RULES["solve_against_identity"].function

case(
    "delta_rule_intra: chunk length",
    Call(systems(128), SYSTEMS(16, 16)),
    "its chunks have 128 tokens", "divide the sequence into chunks of 16, 32 or 64 tokens",
    Call(systems(64), SYSTEMS(16, 16)),
)  # fmt: skip
case(
    "delta_rule_intra: width",
    Call(systems(64), SYSTEMS(40, 16)),
    "K is 40", "pad q and k with zeros to 48 channels",
    Call(systems(64), SYSTEMS(40, 16, 8)),
)  # fmt: skip
case(
    "chunk_delta_rule: width",
    Call(WHOLE, RULE(40, 64)),
    "K is 40", "pad q and k with zeros to 64 channels", Call(WHOLE, RULE(40, 64, 24)),
)  # fmt: skip
case(
    "chunk_delta_rule: rounding",
    Call(chunk_delta_rule_lookalikes.changed("bfloat16_products"), RULE(64, 64)),
    "around a sum or matrix product", "cast q, k, v, the gate and beta to float32 before the rule",
    Call(chunk_delta_rule_lookalikes.rule, RULE(64, 64)),
)  # fmt: skip
