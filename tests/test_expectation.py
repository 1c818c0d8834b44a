"""The setting `expect`, whatever the door and the state of the caches; and the warning where nothing was fused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import fusion_passes
from fusion_passes import expectation, settings
from fusion_passes.records import Record
from fusion_passes.reports import Report
from fusion_passes.testing import run_fused
from tests import gates

# Installed on the module when it is imported, where type checkers cannot see it.
patched: Any = fusion_passes.config.patch

ON_CPU: dict[str, Any] = {"fusion_passes.reference_on_cpu": True}
MISS = Record("gate_cumsum", "near_miss", "the cumsum runs over an axis of 7", "model.py:3", "cumsum")
FUSED = Record("gate_cumsum", "fused", "a gate", "model.py:7", "cumsum_1")


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expectation, "_warned", set())


def compile_gate(expect: Any, f: Any = gates.gate, **options: Any) -> Any:
    given = {**ON_CPU, "fusion_passes.expect": expect, **options}
    return torch.compile(f, backend="fusion_passes", options=given, fullgraph=True)(*gates.inputs())


def twice(*args: torch.Tensor) -> torch.Tensor:
    return gates.gate(*args).sum() + gates.gate(args[0] @ torch.ones(32, 32), *args[1:]).sum()


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expect", [{"gate_cumsum": 1}, "gate_cumsum=1", "", {}])
def test_a_count_that_holds_compiles(expect: Any) -> None:
    torch.testing.assert_close(compile_gate(expect), gates.gate(*gates.inputs()))


def test_two_sites_are_two() -> None:
    compile_gate({"gate_cumsum": 2}, twice)


@pytest.mark.parametrize("expect, strict", [({"gate_cumsum": 24}, False), ("gate_cumsum=0", True)])
def test_another_count_fails_with_the_report(expect: Any, strict: bool) -> None:
    number = expectation.parse(settings.snapshot({"expect": expect}).expect)["gate_cumsum"]
    with pytest.raises(Exception, match=f"expected {number} gate_cumsum, found 1") as error:
        compile_gate(expect, **{"fusion_passes.strict": strict})
    text = str(error.value)
    assert "Fused" in text and "gates.py:17" in text and "softplus gate of float32" in text
    assert "sites of each graph that is compiled" in text and "graph break" not in text


def test_every_name_that_differs_is_told() -> None:
    text = expectation.complaint({"a": 1, "b": 2, "c": 0}, {"b": 2, "c": 3, "d": 4})
    assert text == "expected 1 a, found 0; expected 0 c, found 3"


@pytest.mark.parametrize("branching", [False, True])
def test_graph_breaks_are_named_as_a_cause(branching: bool) -> None:
    def broken(*args: torch.Tensor) -> torch.Tensor:
        x = args[0] + 1
        if not branching:
            torch._dynamo.graph_break()
        elif x.sum() > 1e9:
            return x
        return gates.gate(x, *args[1:])

    options = {**ON_CPU, "fusion_passes.expect": "gate_cumsum=1"}
    compiled = torch.compile(broken, backend="fusion_passes", options=options)
    with pytest.raises(Exception, match="found 0") as error:
        compiled(*gates.inputs())
    assert "a graph break once" in str(error.value) and "fullgraph=True forbids that" in str(error.value)


def test_the_forward_graph_counts_and_the_backward_does_not() -> None:
    weight = torch.randn(16, 16, requires_grad=True)

    def f(x: torch.Tensor, raw: torch.Tensor, a_log: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (x @ weight).sum() * gates.gate(raw, a_log, bias).detach().sum()

    options = {**ON_CPU, "fusion_passes.expect": "gate_cumsum=1"}
    compiled = torch.compile(f, backend="fusion_passes", options=options, fullgraph=True)
    with torch.no_grad():
        inputs = gates.inputs()
    compiled(torch.randn(4, 16), *inputs).backward()
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)
    assert fusion_passes.report().counts == {"gate_cumsum": 1}


def test_sites_inside_control_flow_count() -> None:
    def f(raw: torch.Tensor, a_log: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        def gate(x: torch.Tensor) -> torch.Tensor:
            return gates.gate(x, a_log, bias)

        inside = torch.cond(raw.sum() > 0, gate, lambda x: gate(x) + 1, (raw,))
        return inside + gates.gate(raw * 2 @ torch.ones(32, 32), a_log, bias)

    with pytest.raises(Exception, match="expected 1 gate_cumsum, found 3"):
        compile_gate("gate_cumsum=1", f)
    compile_gate("gate_cumsum=3", f)


def test_other_doors() -> None:
    args = gates.inputs()
    options = fusion_passes.options(reference_on_cpu=True, expect={"gate_cumsum": 2})
    with pytest.raises(Exception, match="expected 2 gate_cumsum, found 1"):
        torch.compile(gates.gate, options=options)(*args)
    torch._dynamo.reset()
    with (
        fusion_passes.enabled(reference_on_cpu=True, expect={"gate_cumsum": 3}),
        pytest.raises(Exception, match="expected 3 gate_cumsum, found 1"),
    ):
        torch.compile(gates.gate)(*args)
    torch._dynamo.reset()
    with patched(expect={"gate_cumsum": 4}), pytest.raises(Exception, match="expected 4 gate_cumsum, found 1"):
        compile_without_option()


def compile_without_option() -> None:
    torch.compile(gates.gate, backend="fusion_passes", options=ON_CPU)(*gates.inputs())


def test_disabled_checks_nothing_and_explain_reports_only() -> None:
    with patched(enabled=False):
        compile_gate({"gate_cumsum": 24})
    with patched(expect="gate_cumsum=24"):
        assert fusion_passes.explain(gates.gate, *gates.inputs()).counts == {"gate_cumsum": 1}


def test_the_testing_helpers_take_it() -> None:
    with pytest.raises(Exception, match="expected 2 gate_cumsum, found 1"):
        run_fused(gates.gate, *gates.inputs(), expect={"gate_cumsum": 2})


def hits() -> int:
    """Compiles of this test that came from a cache."""
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def again(expect: str, f: Any = gates.gate, *args: torch.Tensor) -> str:
    """Compile as a new process would, with the caches as they are: "" or the first line of the error."""
    torch._dynamo.reset()
    options = {**ON_CPU, "fusion_passes.expect": expect}
    try:
        torch.compile(f, backend="fusion_passes", options=options)(*(args or gates.inputs()))
    except Exception as error:
        return next(line for line in str(error).splitlines() if "expected" in line)
    return ""


def test_cold_and_warm_caches_agree() -> None:
    for _ in range(2):
        assert "expected 2 gate_cumsum, found 1" in again("gate_cumsum=2")
    assert again("gate_cumsum=1") == "" and hits() == 0
    assert again("gate_cumsum=1") == "" and hits() > 0
    assert "expected 2 gate_cumsum, found 1" in again("gate_cumsum=2")


def test_the_warning_comes_on_a_warm_cache_too(caplog: pytest.LogCaptureFixture) -> None:
    for wanted in (False, True):
        expectation._warned.clear()
        assert again("", gates.no_gate, torch.ones(2, 3), torch.ones(3, 4)) == "" and (hits() > 0) == wanted
    first, second = said(caplog)
    assert first == second and "it has no operator from which a search starts" in first


# --- what may be written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expect, kind, words",
    [
        ("gate_cumsum", ValueError, "must be written 'name=24,other=2', got 'gate_cumsum'"),
        ("gate_cumsum=-1", ValueError, "got 'gate_cumsum=-1'"),
        ("gate_cumsum=1,gate_cumsum=2", ValueError, "names 'gate_cumsum' twice"),
        ("gate_cumsun=1", ValueError, "unknown fusion 'gate_cumsun'.*Did you mean 'gate_cumsum'.*Known: .*gate_cumsum"),
        ({"gate_cumsum": "1"}, TypeError, "must map names of fusions to integers, got 'gate_cumsum': '1'"),
        ({"gate_cumsum": True}, TypeError, "got 'gate_cumsum': True"),
        ({"gate_cumsum": -1}, ValueError, "a count is 0 or more, got gate_cumsum=-1"),
        (24, TypeError, "fusion_passes.expect must be str, got 24"),
    ],
)
def test_what_is_wrong_is_named(expect: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        fusion_passes.options(expect=expect)


def test_a_fusion_that_is_left_out_cannot_be_expected() -> None:
    with pytest.raises(ValueError, match="asks for gate_cumsum=1, but fusions='none' leaves it out"):
        fusion_passes.options(expect="gate_cumsum=1", fusions="none")
    fusion_passes.options(expect="gate_cumsum=0", fusions="none")


def test_both_forms_are_one_setting() -> None:
    forms = ({"b": 2, "a": 1}, "a=1,b=2")
    assert len({settings.snapshot({"expect": form}) for form in forms}) == 1
    assert expectation.parse(" a = 1 ,b=2, ") == {"a": 1, "b": 2}


def test_reports_can_be_checked_as_a_whole() -> None:
    report = Report((FUSED, FUSED, MISS))
    assert report.expect({"gate_cumsum": 2, "other": 0}) is report
    with pytest.raises(fusion_passes.ExpectationError, match="expected 3 gate_cumsum, found 2\n\nfusion_passes: fused"):
        report.expect({"gate_cumsum": 3})


# --- nothing fused ---------------------------------------------------------------------------------------------------


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = (record for record in caplog.records if record.name.startswith("fusion_passes"))
    return [record.getMessage() for record in ours if record.levelno == logging.WARNING]


def cumulated(x: torch.Tensor) -> torch.Tensor:
    return x.cumsum(1) / 2


def test_one_warning_with_the_nearest_miss(caplog: pytest.LogCaptureFixture) -> None:
    for size in (3, 5):
        torch._dynamo.reset()
        torch.compile(cumulated, backend="fusion_passes", options=ON_CPU, dynamic=False)(torch.randn(size, 7))
    (text,) = said(caplog)
    assert text.startswith("fusion_passes fused nothing in a compiled graph. Nearest: gate_cumsum at ")
    assert "test_expectation.py:" in text and "an axis of 7" in text


def test_no_warning_where_something_was_fused_or_nothing_was_asked(caplog: pytest.LogCaptureFixture) -> None:
    torch.compile(gates.gate, backend="fusion_passes", options=ON_CPU)(*gates.inputs())
    torch.compile(gates.no_gate, backend="fusion_passes", options=ON_CPU)(torch.ones(2, 3), torch.ones(3, 4))
    torch.compile(cumulated, backend="fusion_passes", options={"fusion_passes.fusions": "none"})(torch.randn(3, 7))
    torch.compile(cumulated)(torch.randn(4, 7))
    fusion_passes.explain(cumulated, torch.randn(5, 7))
    assert said(caplog) == []


def test_the_nearest_is_a_refusal_before_a_miss_before_what_was_not_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    refused = Record("gate_cumsum", "refused", "is used elsewhere", "model.py:9", "cumsum_2")
    unseen = Record("gate_cumsum", "near_miss", "not looked at: the tensors are on cpu", "model.py:1", "cumsum_3")
    expectation.warn_if_nothing([unseen, MISS, refused])
    expectation.warn_if_nothing([unseen, MISS])
    expectation.warn_if_nothing([MISS])
    expectation.warn_if_nothing([unseen])
    texts = said(caplog)
    assert ["is used elsewhere" in texts[0], "axis of 7" in texts[1], "not looked at" in texts[2]] == [True] * 3
    assert texts[0].endswith("(2 more in fusion_passes.report())") and len(texts) == 3
