"""The mla_kv_pack fusion: found whatever the spelling, refused with a reason where it means something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusion_passes
from fusion_passes.testing import assert_refuses, run_fused
from tests.patterns.mla_kv_pack_cases import E4, HEAD, HEADS, NOPE, Case, assert_same_bytes
from tests.patterns.mla_kv_pack_lookalikes import LOOKALIKES
from tests.patterns.mla_kv_pack_spellings import SPELLINGS, project
from tests.support import recompiles
from tests.support.versions import not_on_2_11

NAME = "mla_kv_pack"


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_mean_what_they_claim(name: str) -> None:
    not_on_2_11(
        "makes NaN of what is too large for float8, and the fused op the largest number",
        name == "clamped_before_the_scale",
    )
    entry = SPELLINGS[name]
    inputs = entry.inputs()
    assert_same_bytes(entry.function(*inputs), entry.case.meaning(inputs), entry.case.loose)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_found_and_keep_their_value(name: str, dynamic: bool) -> None:
    entry = SPELLINGS[name]
    inputs = entry.inputs()
    if dynamic:
        if entry.case.apart:
            pytest.skip("the graph does not say that x and k_pe have equally many tokens")
        for tensor in (inputs[0], inputs[2]):
            torch._dynamo.mark_dynamic(tensor, 0 if entry.case.batch is None else tensor.shape.index(6))
    actual, report = run_fused(entry.function, *inputs, fusions=NAME)
    assert report.counts[NAME] == 1, str(report)
    assert ("value" in report.fused[0].reason) == (entry.case.v is not None), str(report)
    assert report.fused[0].source.rsplit(":", 1)[0].endswith("mla_kv_pack_spellings.py")
    assert_same_bytes(actual, entry.case.meaning(inputs))


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_are_left_alone(name: str) -> None:
    entry = LOOKALIKES[name]
    report = assert_refuses(entry.function, *entry.inputs(), fusion=NAME, reason=entry.reason, fusions=NAME)
    assert entry.reason or not report.records, str(report)


def reported_steps(steps: Callable[[Tensor, Tensor], Tensor]) -> str:
    """What the report says of a key of which `steps`, with a scale, are taken before the cast."""

    def f(x: Tensor, w: Tensor, pe: Tensor, s: Tensor) -> Tensor:
        k = torch.cat([project(x, w)[0], pe.unsqueeze(1).expand(-1, HEADS, -1)], -1).float()
        return steps(k, s).to(E4)

    x, w, pe = Case().inputs()
    _, report = run_fused(f, x, w, pe, torch.tensor(2.5), fusions=NAME)
    (fused,) = report.fused
    return fused.reason[len("key of 16 + 8 columns") : fused.reason.index(", 4 heads")][2:-1]


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        (lambda k, s: k * s, "*s"),
        (lambda k, s: s * k, "*s"),
        (lambda k, s: k / s, "/s"),
        (lambda k, s: k * (1.0 / s), "*1/s"),
        (lambda k, s: k * s.reciprocal(), "*1/s"),
        (lambda k, s: k * s.bfloat16().view(1, 1), "*s"),
        (lambda k, s: k * 0.1, "*0.1"),
        (lambda k, s: k / 4, "*0.25"),
        (lambda k, s: k * 1.0, ""),
        (lambda k, s: k / torch.tensor(8.0), "*0.125"),
        (lambda k, s: (k * s).clamp(-448, 448), "*s"),
        (lambda k, s: (k * s).clamp(max=448), "*s"),
        (lambda k, s: (k * s).clamp(max=400), "*s clamp(-3e+38,400.0)"),
        (lambda k, s: k.clamp(-448, 448) * s, "clamp(-448.0,448.0) *s"),
        (lambda k, s: (k * s * 0.5).clamp(-1.5, 2), "*s *0.5 clamp(-1.5,2.0)"),
        (lambda k, s: torch.nn.functional.hardtanh(k, -2.0, 3.0) / s, "clamp(-2.0,3.0) /s"),
    ],
)
def test_steps_are_taken_as_written(written: Callable[[Tensor, Tensor], Tensor], steps: str) -> None:
    assert reported_steps(written) == steps


def test_only_the_matching_value_is_taken_along() -> None:
    """Casts of other tensors, of the same window, or of another projection stay where they are."""

    def f(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, ...]:
        k_nope, v = project(x, w)
        k = torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1).to(E4)
        other = project(x + 1, w)[1]
        return pe.to(E4), other.to(E4), v.transpose(0, 1)[:2].to(E4), k, v.to(E4)

    inputs = Case().inputs()
    actual, report = run_fused(f, *inputs, fusions=NAME)
    assert report.counts[NAME] == 1 and "value of 16" in report.fused[0].reason
    assert_same_bytes(actual, f(*inputs))


def test_a_value_that_inductor_fuses_is_left_to_it() -> None:
    def f(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        k_nope, v = project(x, w)
        k = torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1).to(E4)
        return k, v.to(E4).float() * 2

    inputs = Case().inputs()
    actual, report = run_fused(f, *inputs, fusions=NAME)
    assert report.counts[NAME] == 1 and "value" not in report.fused[0].reason
    assert_same_bytes(actual, f(*inputs))


def test_rotary_output_that_is_kept_anyway() -> None:
    def f(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        rotated = pe * 2 + pe.roll(1, -1)
        return torch.cat([project(x, w)[0], rotated.unsqueeze(1).expand(-1, HEADS, -1)], -1).to(E4), rotated

    inputs = Case().inputs()
    actual, report = run_fused(f, *inputs, fusions=NAME)
    assert report.counts[NAME] == 1, str(report)
    assert_same_bytes(actual, f(*inputs))


def test_views_that_only_a_write_went_through_do_not_count_as_uses() -> None:
    """Parts of equal width are written without a copy between, which leaves dead slices behind."""

    def f(kv: Tensor, pe: Tensor) -> Tensor:
        k = kv.new_empty(6, HEADS, 32)
        k[..., :NOPE] = kv[..., :NOPE]
        k[..., NOPE:] = pe.unsqueeze(1).expand(-1, HEADS, -1)
        return k.to(E4)

    inputs = (torch.randn(6, HEADS, HEAD).bfloat16(), torch.randn(6, 16).bfloat16())
    actual, report = run_fused(f, *inputs, fusions=NAME)
    assert report.counts[NAME] == 1, str(report)
    assert_same_bytes(actual, f(*inputs))


def test_two_layers() -> None:
    def f(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, ...]:
        first = SPELLINGS["serving_call_site"].function(x, w, pe)
        return *first, *SPELLINGS["concatenation"].function(x + x, w, pe[:, None])

    inputs = Case().inputs()
    actual, report = run_fused(f, *inputs, fusions=NAME)
    assert report.counts[NAME] == 2, str(report)
    assert_same_bytes(actual, f(*inputs))


def test_a_dropped_rounding_follows_inductor() -> None:
    entry = SPELLINGS["scaled_in_bfloat16"]
    with torch._inductor.config.patch(emulate_precision_casts=True):
        assert_refuses(entry.function, *entry.inputs(), fusion=NAME, reason="emulate_precision_casts", fusions=NAME)


def test_symbolic_heads_are_refused() -> None:
    def f(kv: Tensor, pe: Tensor) -> Tensor:
        return torch.cat([kv[..., :NOPE], pe.unsqueeze(1).expand(-1, kv.shape[1], -1)], -1).to(E4)

    kv, pe = torch.randn(6, 5, HEAD).bfloat16(), torch.randn(6, 8).bfloat16()
    torch._dynamo.mark_dynamic(kv, 1)
    assert_refuses(f, kv, pe, fusion=NAME, reason="number of heads is symbolic", fusions=NAME)


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_gpus_without_saturating_casts_are_refused(name: str) -> None:
    entry = SPELLINGS["serving_call_site"]
    with fusion_passes.config.patch(fusions=NAME, strict=True, arch=name):
        report = fusion_passes.explain(entry.function, *entry.inputs())
    assert report.counts[NAME] == 0
    assert f"({name}) has no saturating conversion" in report.refusals[0].reason


def test_tokens_cause_no_recompile_and_no_guard() -> None:
    entry = SPELLINGS["serving_call_site"]

    def check(actual: Any, inputs: tuple[Tensor, ...]) -> None:
        assert_same_bytes(actual, entry.case.meaning(inputs))

    compiles = {}
    for fusions in ("none", NAME):
        inputs = [entry.case.inputs(tokens=tokens) for tokens in (5, 6, 64, 65, 3)]
        compiles[fusions] = recompiles.graphs(entry.function, fusions, inputs, [(0, 0), (2, 0)], check)
    assert compiles[NAME] == compiles["none"] == 1
    assert fusion_passes.report().counts[NAME] == 1


def test_one_token() -> None:
    for name in ("serving_call_site", "heads_first_as_in_hugging_face", "flattened_before_the_cast"):
        entry = SPELLINGS[name]
        inputs = entry.case.inputs(tokens=1)
        actual, report = run_fused(entry.function, *inputs, fusions=NAME)
        assert report.counts[NAME] == 1, str(report)
        assert_same_bytes(actual, entry.case.meaning(inputs))


def test_real_widths() -> None:
    """GLM: 192 + 64 columns of the key and 256 of the value, 64 heads."""

    def f(kv: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        windows = kv.view(-1, 64, 448)
        k = windows.new_empty(windows.shape[0], 64, 256)
        k[..., :192] = windows[..., :192]
        k[..., 192:] = pe
        return k.to(E4), windows[..., 192:].to(E4)

    inputs = (torch.randn(3, 64 * 448).bfloat16(), torch.randn(3, 1, 64).bfloat16())
    actual, report = run_fused(f, *inputs, fusions=NAME)
    assert report.fused[0].reason.startswith("key of 192 + 64 columns and value of 256, 64 heads")
    assert_same_bytes(actual, f(*inputs))


def test_uncast_keys_where_they_are_asked_for() -> None:
    entry = LOOKALIKES["not_cast"]
    inputs = entry.inputs()
    actual, report = run_fused(entry.function, *inputs, fusions=NAME, always_profitable=True)
    assert report.counts[NAME] == 1
    assert torch.equal(actual, entry.function(*inputs))
