"""The gate_cumsum fusion: found whatever the spelling, refused with a reason where it means something else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusion_passes
from fusion_passes import hf_models
from fusion_passes.testing import assert_fuses, assert_refuses, assert_same, run_fused
from tests import gates
from tests.patterns.gate_cumsum_spellings import EITHER, LOOKALIKES, SPELLINGS, Entry
from tests.support import recompiles
from tests.support.versions import not_on_2_11

NAME = "gate_cumsum"

# Look-alikes of the gate as such that are rewritten all the same, because the op computes exactly what they mean.
EXACT = {
    "raw_padded": "the op has padded raw values",
    "scale_from_the_data": "the scale stays outside of the op",
}


def tolerance(entry: Entry) -> float:
    return 2e-2 if entry.differs == "rounding" else 1e-5


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_found_and_keep_their_value(name: str) -> None:
    entry = SPELLINGS[name]
    report = assert_fuses(entry.function, *entry.inputs(), fusion=NAME)
    assert report.fused[0].source.rsplit(":", 1)[0].endswith(".py")


@pytest.mark.parametrize("name", sorted(set(LOOKALIKES) - set(EXACT)))
def test_lookalikes_are_left_alone(name: str) -> None:
    entry = LOOKALIKES[name]
    assert_refuses(entry.function, *entry.inputs(), fusion=NAME)


@pytest.mark.parametrize("name", [*EXACT, *EITHER])
def test_whatever_may_be_fused_keeps_its_value(name: str) -> None:
    entry = {**LOOKALIKES, **EITHER}[name]
    args = entry.inputs()
    actual, _ = run_fused(entry.function, *args)
    assert_same(actual, entry.function(*entry.inputs()), tolerance(entry), tolerance(entry))


def softplus_gate(raw: Tensor, a_log: Tensor, bias: Tensor, **softplus: Any) -> Tensor:
    return -a_log.exp()[:, None] * F.softplus(raw + bias.view(raw.shape[-2:]), **softplus)


def chunked(g: Tensor, chunk: int = 64) -> Tensor:
    return g.view(g.shape[0], -1, chunk, *g.shape[2:])


def test_reversed_sums() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(softplus_gate(raw, a_log, bias)).flip(2).cumsum(2)

    assert_refuses(f, *gates.inputs(tokens=128), fusion=NAME, reason="reversed in time")


def test_integer_sums() -> None:
    assert_refuses(lambda mask: mask.cumsum(-1), torch.ones(2, 64, dtype=torch.int64), fusion=NAME, reason="over int64")


def test_unsupported_chunk_sizes_are_named() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(softplus_gate(raw, a_log, bias), 60).cumsum(2)

    reason = "over an axis of 60; the kernel has chunks of 16, 32, 64, 128"
    assert_refuses(f, *gates.inputs(tokens=120), fusion=NAME, reason=reason)


def test_low_precision_sums() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(softplus_gate(raw, a_log, bias).bfloat16()).cumsum(2)

    assert_refuses(f, *gates.inputs(tokens=128), fusion=NAME, reason="accumulates in bfloat16")


@pytest.mark.parametrize("tokens", [64, 128])
def test_sums_over_the_whole_sequence(tokens: int) -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return softplus_gate(raw, a_log, bias).cumsum(1)

    for batch in (1, 2):
        inputs = gates.inputs(batch, tokens)
        assert_refuses(f, *inputs, fusion=NAME, reason=f"runs over the whole sequence of {tokens}")


def test_an_escaping_gate() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        g = softplus_gate(raw, a_log, bias)
        return chunked(g).cumsum(2), g

    assert_refuses(f, *gates.inputs(tokens=128), fusion=NAME, reason="returned by the graph")


def test_an_intermediate_used_elsewhere() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        step = F.softplus(raw + bias.view(raw.shape[-2:]))
        return chunked(-a_log.exp()[:, None] * step).cumsum(2), step.sin().sum()

    assert_refuses(f, *gates.inputs(tokens=128), fusion=NAME, reason="used elsewhere")


def test_small_intermediates_may_be_used_elsewhere() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        rate = a_log.exp()
        return chunked(-rate[:, None] * F.softplus(raw + bias.view(raw.shape[-2:]))).cumsum(2), rate

    assert_fuses(f, *gates.inputs(tokens=128), fusion=NAME)


@pytest.mark.parametrize(("beta", "threshold"), [(2.0, 20.0), (0.5, 20.0), (1.0, 1.0), (3.0, 6.0)])
def test_beta_and_threshold_are_exact(beta: float, threshold: float) -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(softplus_gate(raw * 4, a_log, bias, beta=beta, threshold=threshold)).cumsum(2)

    report = run_fused(f, *gates.inputs(tokens=128), always_profitable=True)[1]
    assert report.counts[NAME] == 1
    assert_fuses(f, *gates.inputs(tokens=128), fusion=NAME, always_profitable=True)


def test_raw_computed_by_pointwise_work_does_not_pay() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(softplus_gate(raw.sin() * raw.cos(), a_log, bias)).cumsum(2)

    assert_refuses(f, *gates.inputs(tokens=128), fusion=NAME, reason="which Inductor fuses with the gate")
    assert_fuses(f, *gates.inputs(tokens=128), fusion=NAME, always_profitable=True)


def test_a_single_masked_position_is_seen() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        g = softplus_gate(raw, a_log, bias)
        first = (torch.arange(g.shape[1]) == 77)[None, :, None, None]
        return chunked(torch.where(first, 0.0, g)).cumsum(2)

    assert_refuses(f, *gates.inputs(tokens=512), fusion=NAME, reason="depend on the position")


def test_a_token_hidden_by_padding_is_seen() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        g = softplus_gate(raw, a_log, bias)
        return chunked(F.pad(g[:, :-1], (0, 0, 0, 0, 0, 1))).cumsum(2)

    assert_refuses(f, *gates.inputs(tokens=512), fusion=NAME)


def test_shifted_gates_are_seen() -> None:
    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        g = softplus_gate(raw, a_log, bias)
        return chunked(F.pad(g, (0, 0, 0, 0, 1, -1))).cumsum(2)

    assert_refuses(f, *gates.inputs(tokens=128), fusion=NAME, reason="shifted")


def test_a_dropped_rounding_follows_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    not_on_2_11("drops casts there and back before any pass, whatever emulate_precision_casts says")

    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        z = (raw + bias.view(raw.shape[-2:])).bfloat16().float()
        return chunked(-a_log.exp()[:, None] * F.softplus(z)).cumsum(2)

    with torch._inductor.config.patch(emulate_precision_casts=True):
        assert_refuses(f, *gates.inputs(tokens=128), fusion=NAME, reason="emulate_precision_casts")


def test_symbolic_heads_are_refused() -> None:
    raw, a_log, bias = gates.inputs(tokens=128)
    for tensor, axis in ((raw, 3), (bias, 0)):
        torch._dynamo.mark_dynamic(tensor, axis)

    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(softplus_gate(raw, a_log, bias)).cumsum(2)

    assert_refuses(f, raw, a_log, bias, fusion=NAME, reason="channels is symbolic")


@pytest.mark.parametrize("scale", [1.0, 1 / math.log(2), -2.5])
def test_any_constant_factor(scale: float) -> None:
    def before(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return (chunked(softplus_gate(raw, a_log, bias)) * scale).cumsum(2)

    def after(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(softplus_gate(raw, a_log, bias)).cumsum(2) / (1 / scale)

    for f in (before, after):
        report = assert_fuses(f, *gates.inputs(tokens=128), fusion=NAME)
        assert f"times {scale:.6g}" in report.fused[0].reason


def test_training_keeps_gradients() -> None:
    raw, a_log, bias = (t.requires_grad_() for t in gates.inputs(tokens=128))

    def f(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return chunked(softplus_gate(raw, a_log, bias)).cumsum(2)

    expected = torch.autograd.grad(f(raw, a_log, bias).square().sum(), (raw, a_log, bias))
    options: dict[str, Any] = {"fusion_passes.reference_on_cpu": True, "fusion_passes.strict": True}
    out = torch.compile(f, backend="fusion_passes", options=options, fullgraph=True)(raw, a_log, bias)
    actual = torch.autograd.grad(out.square().sum(), (raw, a_log, bias))
    assert_same(actual, expected, 1e-4, 1e-5)


def test_dynamic_tokens_and_batch_cause_no_recompile() -> None:
    def check(actual: Tensor, inputs: tuple[Tensor, ...]) -> None:
        assert_same(actual, gates.gate(*inputs))

    compiles = {}
    for fusions in ("none", "default"):
        inputs = [gates.inputs(*sizes) for sizes in ((2, 100), (3, 128), (2, 200), (4, 65), (2, 40))]
        compiles[fusions] = recompiles.graphs(gates.gate, fusions, inputs, [(0, 0), (0, 1)], check)
    # Stock Inductor itself recompiles for a single chunk: a guard of its own code generation for cumsum.
    assert compiles["default"] <= compiles["none"]
    assert fusion_passes.report().counts[NAME] == compiles["default"]


FORMS = [(1, 128, torch.bfloat16), (2, 100, torch.float32), (1, 100, torch.bfloat16), (2, 128, torch.float32)]
# The two gates of one model share the forms.
FORMS_OF = {"kimi_linear": FORMS, "glm5_next": FORMS[:1], "glm5_next_softplus": FORMS[1:2]}


@pytest.mark.parametrize(
    ("name", "batch", "tokens", "dtype"),
    # The loop over chunks takes long to trace: two of the forms for most models, together every value of each.
    [(name, *form) for name in hf_models.LINEAR_ATTENTION for form in FORMS_OF.get(name, FORMS[:2])],
    ids=str,
)
def test_every_linear_layer_of_hugging_face_models(name: str, batch: int, tokens: int, dtype: torch.dtype) -> None:
    model, inputs = hf_models.build(name, dtype=dtype, layers=2, seq=tokens, batch=batch)
    with torch.no_grad(), fusion_passes.config.patch(fusions=NAME, strict=True):
        report = fusion_passes.explain(model, **inputs)
    assert report.counts[NAME] == 1, str(report)


def test_several_layers() -> None:
    model, inputs = hf_models.build("qwen3_next", dtype=torch.float32, layers=4, seq=100)
    with torch.no_grad(), fusion_passes.config.patch(fusions=NAME):
        assert fusion_passes.explain(model, **inputs).counts[NAME] == 3


def test_a_model_without_gates() -> None:
    model, inputs = hf_models.build("deepseek_v3", dtype=torch.float32, seq=64)
    with torch.no_grad():
        assert fusion_passes.explain(model, **inputs).counts == {}


def test_an_operand_without_axes_is_named_with_its_value() -> None:
    def f(raw: Tensor, rate: Tensor) -> Tensor:
        return (rate * raw.tanh()).unflatten(1, (-1, 64)).cumsum(2)

    raw = torch.randn(2, 128, 4, generator=torch.Generator().manual_seed(0))
    assert_refuses(f, raw, torch.tensor(0.5), fusion="gate_cumsum", reason="arg1_1 = ")
