"""The chunk_delta_rule fusion: found whatever the spelling, refused with a reason where it means something else."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusion_passes
from fusion_passes import hf_models
from fusion_passes.testing import assert_fuses, assert_refuses, assert_same, run_fused
from tests.patterns.chunk_delta_rule_lookalikes import CHANGES, TOKENS, changed, rule, without_decay
from tests.patterns.chunk_delta_rule_spellings import SPELLINGS, heads_first
from tests.support.delta_rule import operands, passed, recurrence
from tests.support.versions import not_on_2_11

NAME = "chunk_delta_rule"
LINEAR = ("kimi_linear", "qwen3_next", "qwen3_5", "olmo_hybrid", "glm5_next")
# Those with a choice between a triangular solve and a loop, which torch versions trace differently.
SOLVING = ("qwen3_next", "qwen3_5", "olmo_hybrid")


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


def inputs(**sizes: Any) -> tuple[Tensor, ...]:
    return tuple(operands(**{"tokens": TOKENS, "value_heads": 2, "key": 64, "value": 64, **sizes}).values())


# --- found -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_found_and_keep_their_value(name: str) -> None:
    entry = SPELLINGS[name]
    args = entry.inputs()
    module, found = passed(entry.function, *args)
    assert [(r.fusion, r.outcome) for r in found] == [(NAME, "fused")], str(found)
    actual, expected = module(*args), entry.function(*args)
    assert_same(actual, expected, 1e-5, 3e-6)
    if name == "head_first_operands":  # which sorts them
        return
    start = args[5] if entry.state else None
    exact, state = recurrence(
        *args[:5], scale=entry.scale, norm_eps=entry.norm_eps, initial_state=start
    )  # fmt: skip
    results = [actual] if isinstance(actual, Tensor) else list(actual)
    for result, wanted in zip(results, (exact, state)):
        assert (result.double() - wanted).norm() <= 2e-6 * wanted.norm()


@pytest.mark.parametrize("name", ["solved_together", "written_to_slices", "all_in_the_loop", "state_turned"])
def test_spellings_as_inductor_sees_them(name: str) -> None:
    entry = SPELLINGS[name]
    assert_fuses(entry.function, *entry.inputs(), fusion=NAME, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v, g, beta = inputs(dtype=dtype)
    actual, report = run_fused(lambda *args: rule(*args).to(dtype), q, k, v, g, beta)
    assert report.counts == {NAME: 1}
    exact, _ = recurrence(q, k, v, g, beta)
    assert actual.dtype == dtype
    assert (actual.double() - exact).norm() <= torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_of_hugging_face_models(name: str) -> None:
    """Two batches of a length that is no multiple of a chunk."""
    model, given = hf_models.build(name, dtype=torch.float32, layers=2, seq=72, batch=2)
    expected = model(**given).last_hidden_state
    actual, report = run_fused(lambda ids: model(ids, use_cache=False).last_hidden_state, given["input_ids"])
    assert report.counts[NAME] == 1 and "gate_cumsum" not in report.counts, str(report)
    assert (actual.double() - expected.double()).norm() <= 3e-6 * expected.double().norm()


@pytest.mark.parametrize("name", ["qwen3_next", "olmo_hybrid"])
def test_hugging_face_models_in_bfloat16(name: str) -> None:
    model, given = hf_models.build(name, dtype=torch.bfloat16, layers=2, seq=128)
    with fusion_passes.config.patch(fusions=NAME, strict=True):
        report = fusion_passes.explain(model, **given)
    assert report.counts == {NAME: 1}, str(report)


@pytest.mark.parametrize("name", SOLVING)
@pytest.mark.parametrize("loop", [False, True], ids=["solve", "loop"])
def test_the_functions_of_hugging_face_models(name: str, loop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of 16, to be quick, an initial and a final state."""
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    monkeypatch.setattr(modeling, "is_torchdynamo_exporting", lambda: loop)
    function = inspect.unwrap(modeling.torch_chunk_gated_delta_rule)

    def f(*args: Tensor) -> Any:
        *operands, state = args
        return function(
            *operands, chunk_size=16, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    args = (*inputs(tokens=40), torch.randn(2, 2, 64, 64))
    module, found = passed(f, *args)
    assert [record.reason.rsplit(", ", 1)[1] for record in found if record.outcome == "fused"] == ["final state"]
    assert_same(module(*args), f(*args), 1e-5, 3e-6)


def test_further_layers_cost_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion_passes.patterns import _delta_rule_proof as proof

    proof.proofs.clear()
    proofs: list[Any] = []
    meaning = proof._Proof.meaning

    def counted(self: Any) -> Any:
        proofs.append(self)
        return meaning(self)

    monkeypatch.setattr(proof._Proof, "meaning", counted)
    model, given = hf_models.build("qwen3_next", dtype=torch.float32, layers=3, seq=72)
    with fusion_passes.config.patch(fusions=NAME, strict=True):
        report = fusion_passes.explain(model, **given)
    assert report.counts == {NAME: 2}, str(report)
    assert len(proofs) == 1


def test_any_constants() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        def normalised(x: Tensor) -> Tensor:
            return x / ((x * x).sum(-1, keepdim=True) + 3e-4).sqrt()

        return rule(q, k, v, g, beta, chunks=lambda p: (-2.5 * normalised(p[0]), normalised(p[1]), *p[2:]))

    report = assert_fuses(f, *inputs(), fusion=NAME, atol=3e-6)
    assert "64 x 64" in report.fused[0].reason


def fused_call(f: Any, *args: Tensor) -> list[Any]:
    """The arguments with which the rewritten graph of a function calls the op."""
    module, found = passed(f, *args)
    assert_same(module(*args), f(*args), 1e-5, 3e-6)
    calls = module.graph.find_nodes(op="call_function", target=torch.ops.fusion_passes.chunk_delta_rule.default)
    assert len(calls) == 1, str(found)
    return list(calls[0].args)


def test_gates_are_absorbed() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        return rule(q, k, v, -a_log.exp() * F.softplus(a.float() + bias), 2.0 * torch.sigmoid(b))

    q, k, v, a, b = inputs()
    args = fused_call(f, q, k, v, a, b, torch.rand(2), torch.rand(2))
    assert args[11] == "softplus" and args[13] == 2.0
    assert args[3].op == args[4].op == "placeholder"


def test_the_bounded_gate_per_channel_is_absorbed() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
        gate = -3.0 * torch.sigmoid(a_log.exp() * (a.flatten(2) + bias).unflatten(2, (2, 64)))
        return SPELLINGS["channels"].function(q, k, v, gate, b)

    args = fused_call(f, *inputs(batch=1, tokens=40, per_channel=True), torch.rand(1, 1, 2, 1), torch.rand(128))
    assert (args[11], args[12]) == ("bounded", -3.0)
    assert tuple(args[5].meta["val"].shape) == (2,) and tuple(args[6].meta["val"].shape) == (2, 64)


def test_another_gate_stays_outside() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return rule(q, k, v, -F.softplus(a, threshold=5.0), torch.tanh(b))

    args = fused_call(f, *inputs())
    assert args[11] == "log" and args[13] is None


def test_a_gate_that_is_used_elsewhere_stays_outside() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor) -> tuple[Tensor, Tensor]:
        step = F.softplus(a)
        return rule(q, k, v, -a_log.exp() * step, b), step.sin()

    assert fused_call(f, *inputs(), torch.rand(2))[11] == "log"


def test_heads_are_repeated_by_index_and_views_are_read_in_place() -> None:
    def f(qkv: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        q, k, v = qkv.split([64, 64, 128], -1)
        q, k = (x.reshape(2, TOKENS, 1, 64).repeat_interleave(2, 2) for x in (q, k))
        return rule(q, k, v.reshape(2, TOKENS, 2, 64), g, beta)

    _, _, v, g, beta = inputs()
    qkv = torch.cat([torch.randn(2, TOKENS, 128) / 8, v.flatten(2)], -1)
    q, k, v, *_ = fused_call(f, qkv, g, beta)
    assert [tuple(x.meta["val"].shape) for x in (q, k, v)] == [(2, 64, 1, 64), (2, 64, 1, 64), (2, 64, 2, 64)]
    assert [x.meta["val"].stride(1) for x in (q, k, v)] == [256] * 3


def test_operands_with_strided_channels_are_made_dense() -> None:
    q, k, v, g, beta = inputs()
    q = q.transpose(1, 3).contiguous().transpose(1, 3)
    args = fused_call(rule, q, k, v, g, beta)
    assert args[0].meta["val"].stride(-1) == 1


def test_two_sites_and_no_gate_cumsum() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        gate = -F.softplus(a)
        first = rule(q, k, v, gate, b)
        return rule(q, k, first, gate, b)

    _, found = passed(f, *inputs())
    assert [(r.fusion, r.outcome) for r in found] == [(NAME, "fused")] * 2, str(found)


def test_symbolic_batch() -> None:
    args = inputs(batch=3)
    for tensor in args:
        torch._dynamo.mark_dynamic(tensor, 0)
    actual, report = run_fused(rule, *args)
    assert report.counts == {NAME: 1}, str(report)
    assert_same(actual, rule(*args), 1e-5, 3e-6)


def test_compiled_code_calls_the_op() -> None:
    options: dict[str, Any] = {"fusion_passes.reference_on_cpu": True, "fusion_passes.strict": True}
    args = inputs(batch=1)

    def f(*args: Tensor) -> tuple[Tensor, Tensor]:
        both: Any = rule(*args, result=lambda result, state, *more: (result, state))
        return both

    actual = torch.compile(f, backend="fusion_passes", options=options, fullgraph=True)(*args)
    assert_same(actual, f(*args), 1e-5, 3e-6)
    assert fusion_passes.report().counts == {NAME: 1}


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_lookalikes_are_left_alone(name: str) -> None:
    args = inputs()
    module, found = passed(changed(name), *args)
    ours = [record for record in found if record.fusion == NAME]
    assert not [record for record in ours if record.outcome == "fused"]
    assert any(CHANGES[name][1] in record.reason for record in ours), ours
    # the part within the chunks may still be that of a delta rule
    assert_same(module(*args), changed(name)(*args), 1e-5, 1e-2 if "bfloat16" in name else 1e-5)


def test_the_unchanged_loop_is_found() -> None:
    assert_fuses(rule, *inputs(), fusion=NAME, atol=3e-6)


def test_without_a_gate() -> None:
    assert_refuses(without_decay, *inputs(), fusion=NAME, reason="it has no decay")


def test_head_dims_without_a_kernel() -> None:
    entry = SPELLINGS["other_widths"]
    args = operands(1, 64, 2, 2, 48, 80)
    assert_refuses(entry.function, *args.values(), fusion=NAME, reason="K is 48; the kernels have 64, 96, 128")


def test_symbolic_tokens() -> None:
    f = SPELLINGS["solve_against_identity"].function
    _, found = passed(f, *inputs(), symbolic=True)
    (record,) = (record for record in found if record.fusion == NAME)
    assert "the number of tokens is symbolic" in record.reason
    assert record.hint.startswith("compile for a fixed number of tokens, or bind a Hugging Face model")


def test_a_dropped_rounding_follows_inductor() -> None:
    not_on_2_11("drops casts there and back before any pass, whatever emulate_precision_casts says")

    def f(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return rule(q, k, v, g, beta, chunks=lambda p: ((p[0] * 0.5).bfloat16().float() * 2.0, *p[1:]))

    assert run_fused(f, *inputs())[1].counts == {NAME: 1}
    with torch._inductor.config.patch(emulate_precision_casts=True):
        assert_refuses(f, *inputs(), fusion=NAME, reason="emulate_precision_casts")


def test_training_is_left_alone() -> None:
    args = inputs()
    with torch.enable_grad():
        args[2].requires_grad_()
        out, report = run_fused(rule, *args)
        assert report.counts.get(NAME, 0) == 0
        out.sum().backward()
    assert args[2].grad is not None


def test_graphs_without_a_delta_rule_say_nothing() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = torch.cat([k[:, :, :16], (k[:, :, 16:32] @ q[:, :, :16].mT).softmax(-1) @ k[:, :, :16]], 2)
        return torch.cat([F.scaled_dot_product_attention(q, k, v[:, :, :32])] * 2, -1)

    report = run_fused(attention, *heads_first(*inputs()[:3]))[1]
    assert not [r for r in (*report.refusals, *report.near_misses) if r.fusion == NAME], str(report)
