"""Cases, errors, and what a result says about where it was taken; the clock of the GPU is tested in tests/gpu."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_passes import arch, benchmarking
from fusion_passes.benchmarking import Case, relative_error
from fusion_passes.ops import gate_cumsum

H200 = arch.by_name("sm_90")


def case(**changes: Any) -> Case:
    values: dict[str, Any] = {
        "name": "some case", "op": torch.neg, "make": lambda device, generator: (torch.ones(4, device=device),),
        "bytes": 32, "flops": 4, "reference": torch.neg,
    }  # fmt: skip
    return Case(**{**values, **changes})


def test_a_case_needs_no_more_than_it_used_to() -> None:
    plain = Case("name", torch.neg, lambda device, generator: (), 32, 4, torch.neg)
    assert plain.plain is None and not plain.peers and plain.bound is None


def test_the_fusion_has_the_name_of_the_op() -> None:
    assert case(op=gate_cumsum.OP).fusion_name == "gate_cumsum"
    assert case(op=torch.ops.fusion_passes.gate_cumsum).fusion_name == "gate_cumsum"
    assert case(op=gate_cumsum.OP, fusion="other").fusion_name == "other"


def test_floor_is_the_slower_of_memory_and_mathematics() -> None:
    assert case(bytes=4_250_000, flops=1).floor_us(H200) == pytest.approx(1.0)
    assert case(bytes=1, flops=786_000_000).floor_us(H200) == pytest.approx(1.0)


def test_small_cases_are_those_of_few_bytes() -> None:
    assert case(bytes=benchmarking.SMALL_BYTES).small and not case(bytes=benchmarking.SMALL_BYTES + 1).small


@pytest.mark.parametrize(
    "dtype, eager, allowed",
    [
        (torch.float32, 1e-7, 2 * (1e-7 + 2**-24)),
        (torch.bfloat16, 0.0, 2**-7),
        (torch.float8_e4m3fn, 0.0, 2**-3),
        (torch.int32, 0.0, 0.0),
    ],
)
def test_error_bound(dtype: torch.dtype, eager: float, allowed: float) -> None:
    assert case().error_bound(eager, dtype) == pytest.approx(allowed)
    assert case(bound=0.5).error_bound(eager, dtype) == 0.5


def test_inputs_rotate_through_more_than_the_cache() -> None:
    assert len(benchmarking.input_sets(case(bytes=100 << 20), torch.device("cpu"))) == 2
    assert len(benchmarking.input_sets(case(bytes=10 << 20), torch.device("cpu"))) == 13
    assert len(benchmarking.input_sets(case(bytes=1), torch.device("cpu"))) == 64


def test_relative_error() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(exact, exact) == 0
    assert relative_error(torch.tensor([[3.0], [4.5]]), exact) == pytest.approx(0.1)
    assert relative_error((exact, exact * 2), (exact, exact)) == pytest.approx(1.0)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_values_have_to_be_in_the_same_places(value: float) -> None:
    exact = torch.tensor([value, 3.0, 4.0])
    assert relative_error(exact, exact) == 0
    assert relative_error(torch.tensor([value, 3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative_error(torch.tensor([1.0, 3.0, 4.0]), exact) == math.inf
    assert relative_error(exact, torch.tensor([1.0, 3.0, 4.0])) == math.inf


def test_results_of_another_kind_are_errors() -> None:
    with pytest.raises(ValueError, match=r"a result has shape \[3\] and the reference \[2\]"):
        relative_error(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="there are 1 results and 2 in the reference"):
        relative_error(torch.ones(3), (torch.ones(3), torch.ones(3)))


def test_callables_are_timed_in_turns() -> None:
    order: list[str] = []
    functions = {name: lambda x, name=name: order.append(name) for name in "ab"}
    walls = benchmarking.wall_us_together(functions, [(0,), (1,)], calls=2, rounds=2, budget_s=0)
    assert "".join(order) == "aabbaabb" and all(wall > 0 for wall in walls.values())
    benchmarking.wall_us_together(functions, [(0,), (1,)], calls=2, rounds=2, budget_s=0.005)
    assert len(order) > 16


def test_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSION_PASSES_COMMIT", "abc1234")
    assert benchmarking.environment()["commit"] == "abc1234"
    monkeypatch.delenv("FUSION_PASSES_COMMIT")
    monkeypatch.setattr(benchmarking, "__file__", str(tmp_path / "benchmarking.py"))
    assert benchmarking.commit() == "unknown"


def test_environment_names_the_versions() -> None:
    found = benchmarking.environment()
    assert found["torch"] == torch.__version__ and {"python", "triton", "commit", "machine"} <= set(found)


@pytest.mark.parametrize("one", gate_cumsum.cases()[::7], ids=lambda c: c.name)
def test_the_plain_spelling_of_a_case_is_its_reference(one: Case) -> None:
    """On few tokens: the spelling takes any whole number of chunks."""
    raw, a_log, bias, _, chunk, *rest = one.make(torch.device("cpu"), torch.Generator().manual_seed(0))
    args = (raw[:, : 2 * chunk], a_log, bias, 2, chunk, *rest)
    assert one.plain is not None
    assert relative_error(one.plain(*args), benchmarking.exact_result(one, args)) < 1e-6
    assert relative_error(one.op(*args), benchmarking.exact_result(one, args)) < 1e-6
