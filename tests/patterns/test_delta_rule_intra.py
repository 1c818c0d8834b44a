"""The delta_rule_intra fusion: found whatever the spelling, refused with a reason where it means something else."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fusion_passes import hf_models
from fusion_passes.benchmarking import relative_error
from fusion_passes.explanation import tracing_backend
from fusion_passes.graph_pass import FusionPass
from fusion_passes.ops._delta_rule_intra_cases import _case
from fusion_passes.records import Record
from fusion_passes.settings import snapshot
from fusion_passes.testing import assert_fuses, assert_refuses, assert_same, run_fused
from tests.patterns.delta_rule_intra_lookalikes import (
    CHANGES,
    CHANNELS,
    NOT,
    TOKENS,
    attention,
    changed,
    channels,
    systems,
    without_decay,
)
from tests.patterns.delta_rule_intra_spellings import CHUNK, SPELLINGS, Spelling, inverted, solved
from tests.support.delta_rule import passed
from tests.support.delta_rule_intra import exact, passed_with_symbolic_tokens, sums_of
from tests.support.versions import not_on_2_11

NAME = "delta_rule_intra"
OP = torch.ops.fusion_passes.delta_rule_intra.default
BASE = Spelling(systems, tokens=TOKENS)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


def ours(found: list[Record]) -> list[tuple[str, str]]:
    return [(record.outcome, record.reason) for record in found if record.fusion == NAME]


def fused(f: Callable[..., Any], *args: Tensor) -> tuple[GraphModule, str]:
    """The rewritten graph of a function, which keeps its value, and what is said of the one site."""
    module, found = passed(f, *args)
    assert [outcome for outcome, _ in ours(found)] == ["fused"], found
    assert_same(module(*args), f(*args), 1e-5, 3e-6)
    return module, ours(found)[0][1]


# --- found -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_found_and_keep_their_value(name: str) -> None:
    entry = SPELLINGS[name]
    args = entry.inputs()
    module, said = fused(entry.function, *args)
    assert ("pairs of q and k" in said) == (entry.pairs is not None)
    square = [n.name for n in module.graph.nodes if n.name.startswith(("exp", "linalg"))]
    assert not square, f"decays are still formed: {square}"
    if name == "head_first_operands":  # which sorts them
        return
    k, v, g, beta, q = args
    wanted = exact(k, v, sums_of(g, entry.chunk), beta, q, entry.pairs or 1.0, entry.norm_eps)
    for actual, expected in zip(module(*args), wanted):
        assert expected is not None
        assert (actual.double() - expected).norm() <= 3e-6 * expected.norm()


@pytest.mark.parametrize("name", ["solved_apart", "forward_substitution", "pairs_chunk_by_chunk"])
def test_spellings_as_inductor_sees_them(name: str) -> None:
    entry = SPELLINGS[name]
    assert_fuses(entry.function, *entry.inputs(), fusion=NAME, atol=3e-6)


def packed(f: Callable[..., Any], entry: Spelling) -> tuple[Callable[[Tensor], Any], Tensor]:
    """The function of one tensor [B, T, ...] with all its operands, so that there is one symbol for T."""
    args = entry.inputs()
    widths = [arg[0, 0].numel() for arg in args]

    def run(x: Tensor) -> Any:
        parts = x.split(widths, -1)
        return f(*(part.unflatten(-1, arg.shape[2:]) for part, arg in zip(parts, args)))

    return run, torch.cat([arg.flatten(2) for arg in args], -1)


def test_a_symbolic_number_of_tokens() -> None:
    run, x = packed(SPELLINGS["solved_together"].function, SPELLINGS["solved_together"])
    module, found = passed_with_symbolic_tokens(run, x)
    assert [outcome for outcome, _ in ours(found)] == ["fused"], found
    assert_same(module(x), run(x), 1e-5, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_read_where_it_lies(dtype: torch.dtype) -> None:
    entry = SPELLINGS["solved_apart"]
    k, v, g, beta, q = entry.inputs(dtype)
    module, _ = fused(entry.function, k, v, g, beta, q)
    (call,) = module.graph.find_nodes(op="call_function", target=OP)
    read = [node.meta["val"].dtype for node in call.args[:5]]
    assert read == [dtype, dtype, torch.float32, dtype, dtype]
    assert all(call.args[i].op == "placeholder" for i in (0, 1, 3, 4))


def test_heads_are_repeated_by_index_and_views_are_read_in_place() -> None:
    def f(rows: Tensor, g: Tensor, beta: Tensor) -> Any:
        k, v, q = rows.split([32, 192, 32], -1)
        shaped = (x.unflatten(-1, (-1, width)) for x, width in ((k, 32), (v, 48), (q, 32)))
        k, v, q = shaped
        return SPELLINGS["repeated_key_heads"].function(k, v, g, beta, q)

    k, v, g, beta, q = SPELLINGS["repeated_key_heads"].inputs()
    module, said = fused(f, torch.cat([k.flatten(2), v.flatten(2), q.flatten(2)], -1), g, beta)
    (call,) = module.graph.find_nodes(op="call_function", target=OP)
    k, v, q = (call.args[i].meta["val"] for i in (0, 1, 4))
    assert [tuple(x.shape) for x in (k, v, q)] == [(2, 40, 1, 32), (2, 40, 4, 48), (2, 40, 1, 32)]
    assert [x.stride(1) for x in (k, v, q)] == [256] * 3
    assert "1 key and 4 value heads" in said


def hugging_face(name: str, function: str) -> Callable[..., Any]:
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    plain = inspect.unwrap(getattr(modeling, function))
    return lambda k, v, g, beta, q: plain(q, k, v, g, beta, chunk_size=CHUNK, use_qk_l2norm_in_kernel=True)[0]


def test_the_function_of_kimi_linear_with_a_symbolic_number_of_tokens() -> None:
    """The whole is not found there; chunks of 16, to be quick."""
    f = hugging_face("kimi_linear", "chunk_kimi_delta_attention")
    run, x = packed(f, Spelling(f, tokens=24, batch=1, key=16, value=16, per_channel=True))
    module, found = passed_with_symbolic_tokens(run, x)
    assert [outcome for outcome, _ in ours(found)] == ["fused"], found
    assert_same(module(x), run(x), 1e-5, 3e-6)
    assert "pairs of q and k of each chunk" in ours(found)[0][1]


def test_one_graph_of_the_function_of_qwen3_next_serves_all_lengths() -> None:
    """No guard is added: the compiled function takes another number of tokens without a second compile."""
    f = hugging_face("qwen3_next", "torch_chunk_gated_delta_rule")
    run, x = packed(f, Spelling(f, tokens=40, batch=1, key=16, value=16))
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.reset()
    rewritten = FusionPass(snapshot({"strict": True, "reference_on_cpu": True}))
    compiled = torch.compile(run, backend=tracing_backend(rewritten, run_rewritten=True))
    assert_same(compiled(x), run(x), 1e-5, 3e-6)
    other = torch.cat([x, x[:, :5]], 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(compiled(other), run(other), 1e-5, 3e-6)
    ((outcome, said),) = ours(rewritten.found)
    assert outcome == "fused" and "pairs of q and k of all chunks" in said


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
def test_whole_models(name: str) -> None:
    """Their gates are computed right before their first reader, behind the first reader of other results."""
    model, inputs = hf_models.build(name, dtype=torch.bfloat16, layers=2, seq=100)

    def run(given: dict[str, Tensor]) -> Tensor:
        return model(**given).last_hidden_state

    actual, report = run_fused(run, inputs, fusions=NAME, always_profitable=True)
    assert report.counts == {NAME: 1}, str(report)
    assert relative_error(actual, run(inputs)) < 2e-2


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
def test_whole_models_with_a_symbolic_number_of_tokens(name: str) -> None:
    model, inputs = hf_models.build(name, dtype=torch.bfloat16, layers=2, seq=120)

    def run(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).last_hidden_state

    chosen = {"fusions": NAME, "always_profitable": True, "strict": True, "reference_on_cpu": True}
    rewritten = FusionPass(snapshot(chosen))
    torch._dynamo.reset()
    compiled = torch.compile(run, backend=tracing_backend(rewritten, run_rewritten=True), fullgraph=True)
    for tokens in (100, 120):
        ids = inputs["input_ids"][:, :tokens].clone()
        torch._dynamo.mark_dynamic(ids, 1)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=tokens == 120):
            assert relative_error(compiled(ids), run(ids)) < 2e-2
    assert [outcome for outcome, _ in ours(rewritten.found)] == ["fused"], rewritten.found


def test_the_whole_delta_rule_comes_first() -> None:
    f = hugging_face("qwen3_next", "torch_chunk_gated_delta_rule")
    entry = Spelling(f, tokens=40, key=64, value=64)
    _, report = run_fused(f, *entry.inputs())
    assert report.counts == {"chunk_delta_rule": 1}, str(report)


def test_two_sites_the_second_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion_passes.patterns import _intra_proof as proof

    proof.proofs.clear()
    counted = mock.Mock(wraps=proof._meaning)
    monkeypatch.setattr(proof, "_meaning", counted)

    def f(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> Any:
        u, w = systems(k, v, g, beta, q)
        again = u.flatten(2, 3).transpose(1, 2).contiguous()
        return (*systems(k, again, g, beta, q), w)

    args = BASE.inputs()
    module, found = passed(f, *args)
    assert [outcome for outcome, _ in ours(found)] == ["fused"] * 2
    assert_same(module(*args), f(*args), 1e-5, 3e-6)
    assert counted.call_count == 1


@pytest.mark.parametrize("casts", [2, 1])
def test_roundings_of_all_results_are_part_of_the_op(casts: int) -> None:
    def f(*args: Tensor) -> tuple[Tensor, ...]:
        u, w = systems(*args)
        return u.bfloat16(), w.bfloat16() if casts == 2 else w

    args = BASE.inputs()
    module, found = passed(f, *args)
    assert [outcome for outcome, _ in ours(found)] == ["fused"], found
    (call,) = module.graph.find_nodes(op="call_function", target=OP)
    assert call.args[-1] == (torch.bfloat16 if casts == 2 else torch.float32)
    left = module.graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default)
    assert len(left) == (0 if casts == 2 else 1)
    assert_same(module(*args), f(*args), 1e-2, 1e-2)


@pytest.mark.parametrize("kind", ["KDA", "GDN"])
def test_the_spelling_of_the_benchmark_is_found(kind: str) -> None:
    case = _case(kind == "KDA", 1, 1, 128, pairs=True)
    drawn = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))
    tensors = [i for i, value in enumerate(drawn) if isinstance(value, Tensor)]

    def f(*args: Tensor) -> Any:
        assert case.plain is not None
        return case.plain(*(dict(zip(tensors, args)).get(i, value) for i, value in enumerate(drawn)))

    _, found = passed(f, *(drawn[i] for i in tensors))
    assert [(outcome, "pairs of q and k" in text) for outcome, text in ours(found)] == [("fused", True)]


def test_decays_may_have_other_uses() -> None:
    def f(*args: Tensor) -> Any:
        return systems(*args, result=lambda r, k, sums, between, system: (*r, between.sin(), (k * 2).exp()))

    module, _ = fused(f, *BASE.inputs())
    assert not module.graph.find_nodes(op="call_function", target=torch.ops.aten.linalg_solve_triangular.default)


def test_pairs_of_other_keys_stay() -> None:
    def f(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> Any:
        def more(r: Any, keys: Tensor, sums: Tensor, between: Tensor, system: Tensor) -> Any:
            queries = q.transpose(1, 2).float().unflatten(2, (-1, CHUNK))
            return (*r, (queries @ (2 * keys.tanh()).mT) * between, (queries @ keys.mT) * between.square())

        return systems(k, v, g, beta, q, result=more)

    assert "pairs" not in fused(f, *BASE.inputs())[1]


def test_an_inverse_that_is_checked_is_not_computed() -> None:
    not_on_2_11("has no node for the check")
    entry = SPELLINGS["library_inverse"]
    module, _ = fused(entry.function, *entry.inputs())
    checks = [n for n in module.graph.nodes if "_linalg_check_errors" in str(n.target)]
    assert len(checks) == 1
    assert checks[0].args[0].target is torch.ops.aten.full.default


def test_symbolic_batch() -> None:
    args = BASE.inputs(batch=3)
    for tensor in args:
        torch._dynamo.mark_dynamic(tensor, 0)
    actual, report = run_fused(systems, *args)
    assert report.counts == {NAME: 1}, str(report)
    assert_same(actual, systems(*args), 1e-5, 3e-6)


def test_verified_at_compile_time() -> None:
    _, report = run_fused(SPELLINGS["solved_apart"].function, *SPELLINGS["solved_apart"].inputs(), verify=True)
    assert report.counts == {NAME: 1}, str(report)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_lookalikes_are_left_alone(name: str) -> None:
    _, found = passed(changed(name), *BASE.inputs())
    reason = CHANGES[name][1]
    assert not [record for record in found if record.outcome == "fused"]
    assert not reason or any(reason in text for _, text in ours(found)), ours(found)


@pytest.mark.parametrize("name", CHANNELS)
def test_lookalikes_with_a_decay_per_channel(name: str) -> None:
    _, found = passed(channels(name), *Spelling(systems, tokens=32, per_channel=True).inputs())
    assert [NOT in text for _, text in ours(found)] == [True]


def test_what_the_changes_are_made_to_is_found() -> None:
    fused(systems, *BASE.inputs())
    fused(channels(""), *Spelling(systems, tokens=32, per_channel=True).inputs())


@pytest.mark.parametrize("function", [without_decay, attention])
def test_other_functions_say_nothing(function: Callable[..., Any]) -> None:
    assert not ours(passed(function, *BASE.inputs())[1])


def test_chunks_of_128() -> None:
    args = BASE.inputs(tokens=128, batch=1)
    f = inverted(solved, 128)
    assert_refuses(f, *args, fusion=NAME, reason="its chunks have 128 tokens; the kernels have 16, 32, 64")


def test_head_dims_without_a_kernel() -> None:
    args = SPELLINGS["identity_right_hand_side"].inputs(key=24, value=40)
    f = SPELLINGS["identity_right_hand_side"].function
    assert_refuses(f, *args, fusion=NAME, reason="K is 24; the kernels have multiples of 16 up to 256")


def test_symbolic_heads() -> None:
    entry = SPELLINGS["identity_right_hand_side"]
    _, found = passed(entry.function, *entry.inputs(value_heads=3, key_heads=3), symbolic=True)
    assert ["the heads of k are symbolic" in text for _, text in ours(found)] == [True]
    assert ["mark_static" in record.hint for record in found if record.fusion == NAME] == [True]


def test_a_dropped_rounding_follows_inductor() -> None:
    not_on_2_11("drops casts there and back before any pass, whatever emulate_precision_casts says")

    def f(*args: Tensor) -> Any:
        return systems(*args, system=lambda s, *more: s.bfloat16().float())

    assert run_fused(f, *BASE.inputs())[1].counts == {NAME: 1}
    with torch._inductor.config.patch(emulate_precision_casts=True):
        assert_refuses(f, *BASE.inputs(), fusion=NAME, reason="emulate_precision_casts")


def test_training_is_left_alone() -> None:
    args = BASE.inputs()
    with torch.enable_grad():
        args[1].requires_grad_()
        out, report = run_fused(systems, *args)
        assert report.counts.get(NAME, 0) == 0
        (out[0].sum() + out[1].sum()).backward()
    assert args[1].grad is not None


def test_a_leaf_that_is_written_meanwhile() -> None:
    def f(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, q: Tensor) -> Any:
        def write(solution: Any) -> Any:
            beta.add_(1.0)
            return solution

        return systems(k, v, g, beta, q, solution=write)

    args = BASE.inputs()
    expected = f(*(arg.clone() for arg in args))
    actual, _ = run_fused(f, *(arg.clone() for arg in args))
    assert_same(actual, expected, 1e-5, 3e-6)
