"""Backend string, options(), enabled(), configuration and environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import fusion_passes
from fusion_passes import backend, graph_pass
from fusion_passes.settings import option_names, snapshot
from tests import gates

ON_CPU = {"fusion_passes.reference_on_cpu": True}


class Spy(CustomGraphPass):
    """A user's own pass: counts its calls and sees whether ours ran before it."""

    def __init__(self) -> None:
        self.calls = 0
        self.saw_fused = False

    def __call__(self, graph: Graph) -> None:
        self.calls += 1
        self.saw_fused |= any("fusion_passes" in str(node.target) for node in graph.nodes)

    def uuid(self) -> str:
        return "spy"


def compile_gate(**kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    args = gates.inputs()
    return torch.compile(gates.gate, fullgraph=True, **kwargs)(*args), gates.gate(*args)


def fused() -> int:
    return fusion_passes.report().counts["gate_cumsum"]


def test_backend_string_rewrites_and_equals_eager() -> None:
    actual, expected = compile_gate(backend="fusion_passes", options=ON_CPU)
    assert fused() == 1
    torch.testing.assert_close(actual, expected)


def test_cpu_graphs_are_left_alone_by_default() -> None:
    actual, expected = compile_gate(backend="fusion_passes")
    assert fused() == 0
    assert "reference_on_cpu" in fusion_passes.report().near_misses[0].reason
    torch.testing.assert_close(actual, expected)


def test_backend_is_found_without_importing_the_package() -> None:
    code = (
        "import sys, torch\n"
        "f = torch.compile(lambda x: x + 1, backend='fusion_passes')\n"
        "assert f(torch.ones(2)).sum() == 4\n"
        "assert 'fusion_passes.backend' in sys.modules\n"
        "assert 'fusion_passes' in torch._dynamo.list_backends()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_options_merge_into_plain_inductor() -> None:
    compile_gate(backend="inductor", options=fusion_passes.options(reference_on_cpu=True))
    assert fused() == 1


def test_enabled_covers_plain_inductor_inside_the_block_only() -> None:
    with fusion_passes.enabled(reference_on_cpu=True):
        compile_gate()
    assert fused() == 1
    assert inductor_config.post_grad_custom_pre_pass is None
    torch._dynamo.reset()
    compile_gate()
    assert fused() == 1


def test_both_doors_at_once_run_the_pass_once() -> None:
    with fusion_passes.enabled(reference_on_cpu=True):
        compile_gate(backend="fusion_passes", options=ON_CPU)
    assert len(fusion_passes.report().records) == 1


def test_settings_of_options_hold_for_the_backend_too() -> None:
    """Both at once are easily written; what the options say must not be lost."""
    given = fusion_passes.options(reference_on_cpu=True)
    compile_gate(backend="fusion_passes", options={**given, "fusion_passes.reference_on_cpu": False})
    assert fused() == 0
    torch._dynamo.reset()
    compile_gate(backend="fusion_passes", options=given)
    assert fused() == 1


def test_disabled_by_configuration() -> None:
    with fusion_passes.config.patch(enabled=False):
        compile_gate(backend="fusion_passes", options=ON_CPU)
        assert fusion_passes.options() == {}
    assert fusion_passes.report().records == ()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_pass_through(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(gm: Any, example_inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.update(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", spy)
    backend.fusion_passes_backend(torch.fx.symbolic_trace(lambda x: x), [torch.ones(1)], mode=mode)
    expected = torch._inductor.list_mode_options(mode, None)
    assert {name.replace("-", "_"): value for name, value in expected.items()}.items() <= seen.items()


def test_inductor_options_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda gm, inputs, config_patches: seen.update(config_patches)
    )
    gm = torch.fx.symbolic_trace(lambda x: x)
    backend.fusion_passes_backend(gm, [torch.ones(1)], options={"combo_kernels": True, **ON_CPU})
    assert seen["combo_kernels"] is True
    assert not any("fusion_passes" in key for key in seen)


@pytest.mark.parametrize("place", ["config", "option"])
def test_the_users_own_pass_keeps_running_before_ours(place: str) -> None:
    spy = Spy()
    if place == "config":
        with inductor_config.patch(post_grad_custom_pre_pass=spy):
            compile_gate(backend="fusion_passes", options=ON_CPU)
    else:
        compile_gate(backend="fusion_passes", options={**ON_CPU, "post_grad_custom_pre_pass": spy})
    assert spy.calls == 1 and not spy.saw_fused
    assert fused() == 1


def test_composition_for_slots_that_hold_one_callable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes", raising=False)
    spy, ours = Spy(), graph_pass.FusionPass(snapshot())
    composed = graph_pass.compose(spy, ours)
    assert isinstance(composed, graph_pass.ComposedPass)
    assert composed.uuid() == ("spy", ours.uuid())
    assert graph_pass.compose(composed, ours).passes == (spy, ours)
    assert graph_pass.compose(lambda graph: None, ours).uuid() is None
    with inductor_config.patch(post_grad_custom_pre_pass=composed):
        torch.compile(lambda x: x + 1)(torch.ones(3))
    assert spy.calls == 1


def test_a_list_of_passes_is_kept_in_order() -> None:
    first, second, ours = Spy(), Spy(), graph_pass.FusionPass(snapshot())
    assert graph_pass.members(graph_pass.compose([first, second], ours)) == [first, second, ours]


def test_equal_settings_make_equal_passes_and_one_compile() -> None:
    assert graph_pass.FusionPass(snapshot()) == graph_pass.FusionPass(snapshot())
    assert graph_pass.FusionPass(snapshot()) != graph_pass.FusionPass(snapshot({"verify": True}))
    args = gates.inputs()
    for _ in range(2):
        torch.compile(gates.gate, backend="inductor", options=fusion_passes.options(reference_on_cpu=True))(*args)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("option", ["fusion_passes.strikt", "fusion-passes.strikt", "fusion_passes.", "fusion_passes"])
def test_unknown_options_list_the_valid_ones(option: str) -> None:
    with pytest.raises(Exception) as error:
        compile_gate(backend="fusion_passes", options={option: True})
    assert all(name in str(error.value) for name in option_names())


def test_misspelled_options_get_a_suggestion() -> None:
    with pytest.raises(ValueError, match="Did you mean 'fusion_passes.strict'"):
        fusion_passes.options(strikt=True)


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match="fusion_passes.strict must be bool, got 1 of type int"):
        fusion_passes.options(strict=1)


def test_unknown_fusions_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown fusion 'gate_cumsun'.*Did you mean 'gate_cumsum'.*Known: "):
        fusion_passes.options(fusions="default,-gate_cumsun")


def test_fusions_can_be_left_out() -> None:
    compile_gate(backend="fusion_passes", options={**ON_CPU, "fusion_passes.fusions": "default,-gate_cumsum"})
    assert fusion_passes.report().records == ()


def test_old_torch_is_refused() -> None:
    with pytest.raises(ImportError, match="needs torch 2.11 or newer, found 2.10.1"):
        fusion_passes._require_torch("2.10.1+cu128")
    fusion_passes._require_torch("2.11.0")


def test_environment_settings() -> None:
    names = {"STRICT": "1", "FUSIONS": "all,-gate_cumsum", "VERIFY": "1"}
    code = "from fusion_passes.settings import snapshot as s; print(s().strict, s().fusions, s().verify, s().enabled)"
    out = _python(code, {f"FUSION_PASSES_{name}": value for name, value in names.items()})
    assert out == "True all,-gate_cumsum True None"


def test_environment_opens_plain_inductor_after_import() -> None:
    code = (
        "import torch, fusion_passes; from tests import gates\n"
        "torch.compile(gates.gate)(*gates.inputs()); print(fusion_passes.report().counts['gate_cumsum'])"
    )
    environment = {"FUSION_PASSES": "1", "FUSION_PASSES_REFERENCE_ON_CPU": "1"}
    assert _python(code, environment) == "1"
    assert _python(code, {**environment, "FUSION_PASSES": "0"}) == "0"


def _python(code: str, environment: dict[str, str]) -> str:
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env={**os.environ, **environment}, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
