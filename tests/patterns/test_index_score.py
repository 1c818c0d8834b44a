"""The index_score fusion: found whatever the spelling, left alone with a reason where it is something else."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fusion_passes
from fusion_passes.ops.index_score import OP
from fusion_passes.testing import assert_same, run_fused
from tests.patterns.index_score_cases import D, Entry, H, S, T, qkw
from tests.patterns.index_score_lookalikes import LOOKALIKES
from tests.patterns.index_score_spellings import SPELLINGS
from tests.support.delta_rule import passed

NAME = "index_score"
# Eager PyTorch rounds the products of these to the dtype of q.
ROUNDED = {"all_in_bfloat16": 3e-2, "half_precision_products": 4e-3, "rounded_scores": 8e-3}


def run(f: Any, *args: Tensor, **options: Any) -> tuple[Any, list[Any]]:
    module, records = passed(f, *args, **options)
    return module(*args), [record for record in records if record.fusion == NAME]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    entry = SPELLINGS[name]
    inputs = entry.inputs()
    actual, records = run(entry.function, *inputs)
    assert [record.outcome for record in records] == ["fused"], records
    tolerance = ROUNDED.get(name, 1e-5)
    assert_same(actual, entry.function(*inputs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes(name: str) -> None:
    entry = LOOKALIKES[name]
    inputs = entry.inputs()
    actual, records = run(entry.function, *inputs)
    assert all(record.outcome != "fused" for record in records), records
    assert any(entry.reason in record.reason for record in records) if entry.reason else not records, records
    assert_same(actual, entry.function(*inputs))


def test_there_are_enough_of_both() -> None:
    assert len(SPELLINGS) >= 30 and len(LOOKALIKES) >= 25


def call_of(module: Any) -> dict[str, Any]:
    """The arguments of the fused op in a graph, by name."""
    (node,) = (n for n in module.graph.nodes if n.target is OP)
    return dict(zip((argument.name for argument in OP._schema.arguments), node.args))


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name.startswith("causal")])
def test_a_causal_mask_is_not_read(name: str) -> None:
    module, _ = passed(SPELLINGS[name].function, *SPELLINGS[name].inputs())
    call = call_of(module)
    assert (call["mask"], call["mask_kind"], call["causal_offset"]) == (None, "causal", T - S)


def scored(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("sht,sh->st", torch.relu(q.float() @ k.float().T), w)


OTHER_MASKS: dict[str, Any] = {
    "window": lambda s, t: (t <= s + 4) & (t > s - 2),
    "anti_causal": lambda s, t: t >= s,
    "diagonal_is_kept": lambda s, t: (t <= s) | (t == s + 2),
    "chunks": lambda s, t: t // 3 <= s // 2,
    "steeper": lambda s, t: t <= 2 * s,
    "first_keys": lambda s, t: (t < 4) & (s >= 0),
    "all_but_one": lambda s, t: (t <= s + 4) & ((s != 3) | (t != 1)),
}


@pytest.mark.parametrize("name", OTHER_MASKS)
def test_masks_of_positions_that_are_not_causal_are_read(name: str) -> None:
    def f(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        seen = OTHER_MASKS[name](torch.arange(S)[:, None], torch.arange(T)[None])
        return scored(q, k, w).masked_fill(~seen, -7.0).topk(3).values

    inputs = qkw()()
    module, records = passed(f, *inputs)
    assert [r.outcome for r in records if r.fusion == NAME] == ["fused"]
    assert call_of(module)["mask_kind"] in ("keep", "drop") and call_of(module)["fill"] == -7.0
    assert_same(module(*inputs), f(*inputs))


@pytest.mark.parametrize("offset", [-2, 0, 3, T])
def test_causal_offsets(offset: int) -> None:
    def f(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        hidden = torch.arange(T) > torch.arange(S).unsqueeze(-1) + offset
        return scored(q, k, w).masked_fill(hidden, -1e9).topk(3).values

    inputs = qkw()()
    module, _ = passed(f, *inputs)
    call = call_of(module)
    assert (call["mask_kind"], call["causal_offset"]) == ("causal", min(offset, T - 1))
    assert_same(module(*inputs), f(*inputs))


def test_two_masks() -> None:
    """The inner one is the op's, the outer one stays in the graph."""

    def f(q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.arange(T) > torch.arange(S)[:, None] + 4
        return scored(q, k, w).masked_fill(hidden, -math.inf).masked_fill(~mask, -1e9).topk(3).values

    inputs = (*qkw()(), torch.rand(S, T, generator=torch.Generator().manual_seed(0)) < 0.5)
    module, _ = passed(f, *inputs)
    assert call_of(module)["mask_kind"] == "causal"
    assert_same(module(*inputs), f(*inputs))


def test_a_summand_per_query() -> None:
    def f(q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
        return (scored(q, k, w) + mask[:, None]).topk(3).values

    inputs = (*qkw()(), torch.randn(S))
    actual, records = run(f, *inputs)
    assert [r.outcome for r in records] == ["fused"]
    assert_same(actual, f(*inputs))


# --- numerics --------------------------------------------------------------------------------------------------------


def test_nan_is_treated_as_by_the_activation() -> None:
    for name, keeps in (("clamp", True), ("maximum", True), ("where_positive", False), ("negated_minimum", True)):
        entry = SPELLINGS[name]
        q, k, w = entry.inputs()
        k[1, 2] = math.nan
        module, _ = passed(entry.function, q, k, w)
        assert call_of(module)["keep_nan"] is keeps
        assert_same(module(q, k, w), entry.function(q, k, w))


SCALED = ("float8_keys_with_scales", "float8_with_scaled_products", "float8_with_scaled_scores")


@pytest.mark.parametrize("name", SCALED)
def test_negative_scales(name: str) -> None:
    """The op says whether a scale acts before the relu, so that its sign does not matter."""
    entry = SPELLINGS[name]
    inputs = [-x if x.shape in ((T, 1), (S, H, 1)) else x for x in entry.inputs()]
    module, _ = passed(entry.function, *inputs)
    assert call_of(module)["scale_after"] is (name == "float8_with_scaled_scores")
    assert_same(module(*inputs), entry.function(*inputs))


def test_precision_follows_the_setting() -> None:
    entry = SPELLINGS["single_precision"]
    assert call_of(passed(entry.function, *entry.inputs())[0])["precision"] == "tf32x3"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert call_of(passed(entry.function, *entry.inputs())[0])["precision"] == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "on, name, reason",
    [
        ("sm_80", "float8_with_both_scales", "has no products of float8_e4m3fn"),
        ("gfx942", "wide_heads", "128 heads of 256 channels in float32 are too many"),
    ],
)
def test_gpus_that_cannot_are_refused(on: str, name: str, reason: str) -> None:
    entry = {**SPELLINGS, "wide_heads": Entry(scored, qkw(heads=128, width=256, dtype=torch.float32))}[name]
    with fusion_passes.config.patch(fusions=NAME, strict=True, arch=on):
        report = fusion_passes.explain(entry.function, *entry.inputs())
    assert report.counts[NAME] == 0 and reason in report.refusals[0].reason


def test_rounded_products_are_kept_where_asked() -> None:
    entry = SPELLINGS["all_in_bfloat16"]
    with torch._inductor.config.patch(emulate_precision_casts=True):
        _, records = run(entry.function, *entry.inputs())
    assert "emulate_precision_casts asks to keep" in records[0].reason


# --- the rest of the graph -------------------------------------------------------------------------------------------


def test_two_sites_one_of_which_depends_on_the_other() -> None:
    def f(q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
        first = scored(q, k, w).masked_fill(~mask, -math.inf).topk(3).values
        return scored(q + first.mean().to(q.dtype), k, w).masked_fill(~mask, -math.inf).topk(3).values

    inputs = (*qkw()(), torch.ones(S, T, dtype=torch.bool).tril(4))
    actual, records = run(f, *inputs)
    assert [r.outcome for r in records] == ["fused", "fused"]
    assert all("boolean mask" in r.reason for r in records)
    assert_same(actual, f(*inputs), rtol=1e-2, atol=1e-2)


def test_the_products_per_head_are_gone() -> None:
    for name in ("hugging_face", "loop_over_heads", "stacked_heads", "float8_with_both_scales"):
        module, _ = passed(SPELLINGS[name].function, *SPELLINGS[name].inputs())
        targets = {n.target for n in module.graph.nodes}
        assert not targets & {torch.ops.aten.bmm.default, torch.ops.aten.mm.default}, name


def test_the_report() -> None:
    _, records = run(SPELLINGS["hugging_face"].function, *SPELLINGS["hugging_face"].inputs())
    assert records[0].reason == "8 heads of 16 channels, bfloat16, boolean mask, times 0.25"
    assert records[0].saved_bytes == 2 * 4 * 2 * S * H * T


# --- sizes -----------------------------------------------------------------------------------------------------------


def by_mask(q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    scores = torch.relu(torch.matmul(q.float(), k.mT.float().unsqueeze(1)) * D**-0.5)
    return torch.matmul(w.unsqueeze(-2), scores).squeeze(-2).masked_fill(~mask, -math.inf).topk(3).values


def by_positions(q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bsht,bsh->bst", torch.einsum("bshd,btd->bsht", q.float(), k.float()).relu(), w)
    last = torch.arange(q.shape[1]) + (k.shape[1] - q.shape[1])
    return scores.masked_fill(torch.arange(k.shape[1]) > last[:, None], -math.inf).topk(1).values


@pytest.mark.parametrize("function", [by_mask, by_positions])
def test_symbolic_batch_queries_and_keys(function: Any) -> None:
    """One graph serves all sizes; no guard is added."""
    made = []
    for fusions in ("none", NAME):
        found: list[tuple[list[str], int]] = []

        def backend(gm: Any, inputs: Any, fusions: str = fusions, found: list[Any] = found) -> Any:
            from fusion_passes.explanation import tracing_backend
            from fusion_passes.graph_pass import FusionPass
            from fusion_passes.settings import snapshot

            explained = FusionPass(snapshot({"strict": True, "reference_on_cpu": True, "fusions": fusions}))
            traced = tracing_backend(explained, run_rewritten=True)(gm, inputs)
            context = torch._guards.TracingContext.get()
            assert context.fake_mode is not None and context.fake_mode.shape_env is not None
            reasons = [record.reason for record in explained.found if record.outcome == "fused"]
            found.append((reasons, len(context.fake_mode.shape_env.guards)))
            return traced

        torch._dynamo.reset()
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        for batch, queries, keys in ((2, 6, 10), (3, 5, 11), (4, 9, 9)):
            inputs = (*qkw(batch, queries=queries, keys=keys)(), torch.rand(batch, queries, keys) < 0.7)
            for tensor, axes in zip(inputs, ((0, 1), (0, 1), (0, 1), (0, 1, 2))):
                for axis in axes:
                    torch._dynamo.mark_dynamic(tensor, axis)
            assert_same(compiled(*inputs), function(*inputs))
        made.append(found)
    assert len(made[0]) == len(made[1])
    assert all(len(reasons) == 1 for reasons, _ in made[1])
    assert [guards for _, guards in made[0]] == [guards for _, guards in made[1]]
    kind = "boolean" if function is by_mask else "causal"
    assert all(f"{kind} mask" in reasons[0] for reasons, _ in made[1])


def test_sizes_that_depend_on_data_break_nothing() -> None:
    def f(q: Tensor, k: Tensor, w: Tensor, chosen: Tensor) -> Tensor:
        return scored(q, k[chosen.nonzero().squeeze(1)], w)

    inputs = (*qkw()(), torch.arange(T) % 3 > 0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        actual, report = run_fused(f, *inputs)
    assert_same(actual, f(*inputs))
    assert report.counts[NAME] == 0


# --- Hugging Face ----------------------------------------------------------------------------------------------------

MODELS = {
    "deepseek_v32": ("DeepseekV32Indexer", "DeepseekV32Config"),
    "glm_moe_dsa": ("GlmMoeDsaIndexer", "GlmMoeDsaConfig"),
    "hy_v4": ("HYV4Indexer", "HYV4Config"),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_indexers_of_hugging_face(name: str) -> None:
    modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    configuration = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    indexer, config = MODELS[name]
    widths = {"hidden_size": 64, "q_lora_rank": 32, "index_n_heads": 8, "index_topk": 8, "index_head_dim": 64}
    made = getattr(configuration, config)(**widths, qk_rope_head_dim=32)
    model = getattr(modeling, indexer)(made, 0).bfloat16().eval()
    tokens = 24
    hidden, residual, cos, sin = (torch.randn(2, tokens, n).bfloat16() for n in (64, 32, 32, 32))
    seen = torch.ones(2, tokens, tokens, dtype=torch.bool).tril()
    lowest = torch.finfo(torch.bfloat16).min
    added = torch.zeros(seen.shape).masked_fill(~seen, lowest).bfloat16()
    for mask in (seen, added) if name == "deepseek_v32" else (added,):
        args = (hidden, residual, (cos, sin), mask, torch.arange(tokens)[None], None)
        actual, report = run_fused(model, *args, fusions=NAME)
        assert report.counts[NAME] == 1, report
        for row in range(8, tokens):  # before that there are no eight keys to choose from
            chosen, expected = (set(indices[0, row].tolist()) for indices in (actual, model(*args)))
            assert len(chosen & expected) >= 7, row
