"""The clock of the benchmarks on a GPU, a whole row of a case, and a whole row of a model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fusion_passes import arch, benchmarking
from fusion_passes.bench import contestants, models, runner, verdicts
from fusion_passes.benchmarking import Case
from fusion_passes.ops import _gate_cumsum_cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU = torch.device("cuda", 0)


def ones(count: int, device: torch.device, generator: torch.Generator) -> tuple[torch.Tensor]:
    return (torch.ones(count, device=device),)


def test_time_grows_with_the_bytes_and_stays_above_the_floor() -> None:
    on = arch.of_device(GPU)
    times = []
    for elements in (1 << 22, 1 << 25):
        make = functools.partial(ones, elements)
        case = Case("negation", torch.neg, make, bytes=8 * elements, flops=elements, reference=torch.neg)
        timing = benchmarking.measure(case.op, benchmarking.input_sets(case, GPU))
        assert timing.gpu_min_us <= timing.gpu_us <= timing.gpu_max_us
        assert timing.gpu_us > 0.8 * case.floor_us(on)
        times.append(timing.gpu_us)
    assert 4 < times[1] / times[0] < 16


def test_contestants_take_turns_and_one_that_cannot_be_captured_is_told() -> None:
    def synchronising(x: torch.Tensor) -> float:
        return float(x.sum())

    sets = [(torch.ones(1 << 20, device=GPU),) for _ in range(4)]
    found = benchmarking.measure_together({"good": torch.neg, "again": torch.neg, "bad": synchronising}, sets)
    assert isinstance(found["bad"], Exception)
    good, again = found["good"], found["again"]
    assert isinstance(good, benchmarking.Timing) and isinstance(again, benchmarking.Timing)
    assert good.gpu_us == pytest.approx(again.gpu_us, rel=0.2)
    assert torch.randn(8, device=GPU).isfinite().all()


def test_copy_rate_is_near_that_of_the_table() -> None:
    assert 0.5 < benchmarking.copy_rate() / arch.of_device(GPU).copy_rate < 1.2


def test_a_row_of_a_case() -> None:
    case = _gate_cumsum_cases._case(32, 128, 2048, "bnchk")
    row = runner.measure("gate_cumsum", case, contestants.known_baselines([case]), arch.of_device(GPU), GPU)
    assert row.entries["fused"].sites == {"gate_cumsum": 1}
    for name in ("fused", "op", "stock", "combo_kernels", "max_autotune", "eager"):
        entry = row.entries[name]
        assert not entry.failed and (entry.gpu_us or 0) > 0.8 * (row.floor_us or 0), (name, entry)
    assert not [text for text in verdicts.failures([row]) if "GPU time" in text]


def test_a_row_of_a_model() -> None:
    pytest.importorskip("transformers", minversion="5.17")
    options: dict[str, Any] = {"real": False}
    row = models.measure("qwen3_next", models.Size(128, 1, 2), ["eager", "stock"], GPU, **options)
    for name in ("fused", "eager", "stock"):
        entry = row.entries[name]
        assert not entry.failed, entry
        assert (entry.gpu_us or 0) > 0 and (entry.wall_us or 0) > 0 and (entry.kernels or 0) > 0
    assert (row.entries["fused"].kernels or 0) < (row.entries["eager"].kernels or 0)
    assert row.entries["fused"].sites
