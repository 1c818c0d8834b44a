"""`explain`: what it takes, what it says, and what it leaves as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import fusion_passes
from fusion_passes import arch, config, explain
from tests import gates

# Installed on the module when it is imported, where type checkers cannot see it.
patched: Any = config.patch

ON_CPU = {"fusion_passes.reference_on_cpu": True}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


class Layer(torch.nn.Module):
    """A projection and a gate of its output, two heads of 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        _, weight, a_log, bias = gates.projection_inputs()
        self.weight, self.a_log = torch.nn.Parameter(weight), torch.nn.Parameter(a_log)
        self.bias = torch.nn.Parameter(bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor, *, double: bool = False) -> Tensor:
        out = gates.after_projection(x, self.weight, self.a_log, self.bias)
        return gates.after_projection(x + 1, self.weight, self.a_log, self.bias) + out if double else out


def x(tokens: int = 100) -> Tensor:
    return gates.projection_inputs(tokens)[0]


def in_place(layer: Layer) -> Layer:
    layer.compile(backend="eager")
    return layer


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: layer,
        lambda layer: layer.forward,
        torch.compile,
        lambda layer: torch.compile(layer, backend="fusion_passes", mode="max-autotune"),
        lambda layer: torch.compile(layer.forward),
        lambda layer: torch.compile(lambda value: layer(value)),
        in_place,
    ],
    ids=["module", "method", "compiled_module", "own_backend", "compiled_method", "compiled_function", "in_place"],
)
def test_modules_and_functions_compiled_or_not(wrap: Callable[[Layer], Callable[..., Tensor]]) -> None:
    report = explain(wrap(Layer()), x())
    assert report.counts == {"gate_cumsum": 1}
    assert report.fused[0].source.rsplit(":", 1)[0].endswith("gates.py")


def test_keyword_arguments_are_passed_on() -> None:
    assert explain(Layer(), x(), double=True).counts["gate_cumsum"] == 2


def test_every_graph_of_the_call_is_covered_and_breaks_are_noted() -> None:
    def broken(layer: Layer, value: Tensor) -> Tensor:
        first = layer(value)
        torch._dynamo.graph_break()
        return first + layer(value)

    report = explain(broken, Layer(), x())
    assert report.counts["gate_cumsum"] == 2 and len({r.graph for r in report.fused}) >= 1
    assert any("1 graph break:" in note for note in report.notes)
    assert not any("graph break" in note for note in explain(Layer(), x()).notes)


def test_branches_on_tensors_are_graph_breaks() -> None:
    def branching(layer: Layer, value: Tensor) -> Tensor:
        first = layer(value)
        return first + layer(value) if first.sum() > 1e9 else first - layer(value)

    report = explain(branching, Layer(), x())
    assert report.counts["gate_cumsum"] == 2
    assert any("1 graph break:" in note for note in report.notes), report.notes


def test_a_function_that_is_left_to_python_is_a_graph_break() -> None:
    def looping(value: Tensor) -> Tensor:
        for _ in range(2):
            value = value.sin()
            torch._dynamo.graph_break()
        return value

    notes = explain(looping, x()).notes
    assert any("graph break" in note for note in notes), notes


def symbolic_tokens(f: Callable[..., Any], value: Tensor) -> bool:
    """Whether `explain` traced with a symbolic number of tokens: a fusion sees the shapes of the graph."""
    seen: list[bool] = []
    fusion = fusion_passes.registry.known()["gate_cumsum"]

    def match(anchor: torch.fx.Node, context: Any) -> Any:
        seen.append(any(isinstance(n, torch.SymInt) for n in anchor.meta["val"].shape))
        return fusion.match(anchor, context)

    fusion_passes.registry._fusions["gate_cumsum"] = dataclasses.replace(fusion, match=match)
    try:
        assert explain(f, value).counts["gate_cumsum"] == 1
    finally:
        fusion_passes.registry._fusions["gate_cumsum"] = fusion
    return seen[0]


def test_dynamic_shapes() -> None:
    assert not symbolic_tokens(Layer(), x())
    assert symbolic_tokens(torch.compile(Layer(), dynamic=True), x())
    assert symbolic_tokens(torch.compile(Layer().forward, dynamic=True), x())
    marked = x()
    torch._dynamo.mark_dynamic(marked, 1)
    assert symbolic_tokens(Layer(), marked)


@no_gpu
def test_the_assumed_gpu_is_named() -> None:
    assert explain(Layer(), x()).notes == ("No GPU on this machine: NVIDIA H200 (sm_90) is assumed.",)
    with patched(arch="gfx942"):
        assert "AMD MI300X (gfx942)" in explain(Layer(), x()).notes[0]


def test_an_unknown_gpu_is_an_error_that_lists_the_known_ones() -> None:
    with patched(arch="sm_91"), pytest.raises(ValueError, match="unknown architecture 'sm_91'") as error:
        explain(Layer(), x())
    assert all(name in str(error.value) for name in arch.TABLE)


def test_settings_apply() -> None:
    with patched(fusions="default,-gate_cumsum"):
        assert explain(Layer(), x()).records == ()


def test_nothing_is_cached_counted_or_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    explain(Layer(), x())
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert fusion_passes.report().records == ()
    assert not any(key.startswith(("fxgraph_cache", "fusion_passes")) for key in counters["inductor"])
    assert torch._inductor.config.post_grad_custom_pre_pass is None


def test_the_model_works_as_before() -> None:
    layer = Layer()
    expected = layer(x())
    compiled = torch.compile(layer, backend="eager")
    for call in (layer, compiled, in_place(Layer())):
        explain(call, x())
        torch.testing.assert_close(call(x()), expected)
    frames: list[int] = []

    def counting(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        frames.append(len(inputs))
        return gm.forward

    counted = torch.compile(layer, backend=counting)
    counted(x())
    explain(counted, x())
    counted(x())
    assert len(frames) == 2, "the model's own backend compiles again after explain, and is not called by it"


def test_the_call_runs_once_and_its_error_is_passed_on() -> None:
    calls: list[int] = []

    def f(value: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        calls.append(1)
        return value + 1

    explain(f, x())
    assert len(calls) == 1
    with pytest.raises(Exception, match="size of tensor|must match|broadcast"):
        explain(lambda a, b: a + b, torch.ones(2), torch.ones(3))
    assert explain(Layer(), x()).counts["gate_cumsum"] == 1


def test_training_graphs_are_covered() -> None:
    layer = Layer().requires_grad_()
    forward, *backward = explain(lambda value: layer(value).sum(), x()).records
    assert forward.outcome in ("fused", "refused")
    assert forward.outcome == "fused" or "saved for the backward pass" in forward.reason
    assert all(record.outcome == "near_miss" for record in backward)


@no_gpu
def test_where_nothing_is_found_the_notes_say_where_searches_started() -> None:
    notes = explain(lambda value: value.contiguous().transpose(1, 2).clone(), x()).notes
    assert len(notes) == 2 and notes[0].startswith("Searched from copy (")
    assert "test_explanation.py:" in notes[0] and notes[0].endswith("nothing of the kind is around it.")
    notes = explain(lambda value: value + 1, x()).notes
    assert notes[0].startswith("No search started: a fusion is looked for from ") and "cumsum" in notes[0]
    assert not any("earch" in note for note in explain(Layer(), x()).notes)
