"""Tools that people use beside torch.compile: its logs, tlparse, `torch._dynamo.explain`, profilers, the bisector."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.compiler_bisector import CompilerBisector
from torch.fx import Graph, Node

import fusion_passes
from fusion_passes import registry, rewrite
from fusion_passes.backend import fusion_passes_backend
from fusion_passes.fusion import Context, Fusion, Site
from tests import gates

ROOT = Path(__file__).resolve().parents[1]
ASINH = torch.ops.aten.asinh.default


@pytest.fixture
def quick() -> Iterator[None]:
    """No C++ for what is not ours: the same passes in less time."""
    settings: dict[str, Any] = {"fallback_by_default": True} if hasattr(inductor_config, "fallback_by_default") else {}
    with inductor_config.patch(settings):
        yield


# --- logs, traces, and tlparse ---------------------------------------------------------------------------------------

# Three compiles: a cold one, one without a candidate, and the first again from a warm cache.
PROGRAM = """
import torch
from tests import gates
options = {"fusion_passes.reference_on_cpu": True}
torch.compile(gates.gate, backend="fusion_passes", options=options)(*gates.inputs())
torch.compile(lambda x: x @ x, backend="fusion_passes", options=options)(torch.ones(3, 3))
torch._dynamo.reset()
torch.compile(gates.gate, backend="fusion_passes", options=options)(*gates.inputs())
counters = torch._dynamo.utils.counters
assert counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > 0
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the program logs, and its structured trace."""
    folder = tmp_path_factory.mktemp("trace")
    environment = {
        "TORCH_LOGS": "+fusion_passes", "TORCH_TRACE": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (trace,) = folder.glob("*.log")
    return done.stderr, trace


def test_logs(logged: tuple[str, Path]) -> None:
    text, _ = logged
    assert "gate_cumsum fused at " in text and "softplus gate of float32" in text
    assert "1 of 1 candidate sites fused" in text


def check_reports(reports: list[list[dict[str, Any]]]) -> None:
    without, cold, warm = sorted(reports, key=len)
    (record,) = cold
    assert record["fusion"] == "gate_cumsum" and record["outcome"] == "fused" and "gates.py:" in record["source"]
    assert without == [] and warm == cold


def test_every_compile_has_an_artifact_in_the_trace(logged: tuple[str, Path]) -> None:
    lines = logged[1].read_text().splitlines()
    reports = []
    for at in (i for i, line in enumerate(lines) if '"name": "fusion_passes_report"' in line):
        end = next((i for i in range(at + 1, len(lines)) if not lines[i].startswith("\t")), len(lines))
        reports.append(json.loads("\n".join(line[1:] for line in lines[at + 1 : end])))
    check_reports(reports)


def test_tlparse_shows_the_artifacts(logged: tuple[str, Path], tmp_path: Path) -> None:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    tlparse = shutil.which("tlparse", path=places)
    if tlparse is None:
        pytest.skip("needs tlparse: pip install tlparse")
    out = tmp_path / "out"
    subprocess.run([tlparse, logged[1], "-o", out, "--no-browser", "--strict"], check=True, capture_output=True)
    found = list(out.rglob("fusion_passes_report_*.json"))
    index = (out / "index.html").read_text()
    assert all(path.relative_to(out).as_posix() in index for path in found)
    check_reports([json.loads(path.read_text()) for path in found])


# --- torch._dynamo.explain -------------------------------------------------------------------------------------------


def test_explain_of_dynamo_works_beside_us(quick: None) -> None:
    def two_graphs(*args: Tensor) -> Tensor:
        first = gates.gate(*args)
        torch._dynamo.graph_break()
        return first + 1

    with fusion_passes.enabled(reference_on_cpu=True):
        compiled = torch.compile(gates.gate)
        torch.testing.assert_close(compiled(*gates.inputs()), gates.gate(*gates.inputs()))
        seen = torch._dynamo.explain(two_graphs)(*gates.inputs())
    assert (seen.graph_count, seen.graph_break_count) == (2, 1)
    assert fusion_passes.report().counts["gate_cumsum"] == 1, "it compiles nothing"
    assert fusion_passes.explain(two_graphs, *gates.inputs()).counts["gate_cumsum"] == 1


# --- profilers -------------------------------------------------------------------------------------------------------


def test_a_trace_names_our_ops(quick: None) -> None:
    compiled = torch.compile(gates.gate, backend="fusion_passes", options={"fusion_passes.reference_on_cpu": True})
    compiled(*gates.inputs())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        compiled(*gates.inputs())
    assert sum(event.name == "fusion_passes::gate_cumsum" for event in trace.events()) == 1


def test_kernels_are_named_after_what_they_compute() -> None:
    """A trace of a GPU shows the name of the function, which Inductor keeps: see the tests of generated code."""
    ops = [path.stem for path in (ROOT / "ops").glob("[a-z]*.py")]
    found = []
    for path in (ROOT / "ops").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            jitted = isinstance(node, ast.FunctionDef) and "jit" in map(_last_name, node.decorator_list)
            if jitted and isinstance(node, ast.FunctionDef) and node.name.endswith("kernel"):
                found.append(node.name)
    assert len(found) >= len(ops) - 1 and len(set(found)) == len(found)
    for name in found:
        assert name.startswith((*ops, "delta_rule_")), f"{name} does not say of which op it is"


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


# --- the bisector ----------------------------------------------------------------------------------------------------


def two_sites(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    first = x.asinh()
    second = y.asinh()
    return first, second


def _match(anchor: Node, context: Context) -> Site:
    (leaf,) = anchor.all_input_nodes
    wrong = leaf is not context.graph.find_nodes(op="placeholder")[0]
    return Site(anchor, anchor, {"x": leaf}, set(), params={"factor": 1.5 if wrong else 1.0})


def _replace(site: Site, graph: Graph) -> Node:
    again = rewrite.call(graph, ASINH, site.leaves["x"])
    return rewrite.call(graph, torch.ops.aten.mul.Tensor, again, site.params["factor"])


@pytest.fixture
def half_wrong(quick: None) -> Iterator[None]:
    """A fusion that takes every asinh, and gets that of the second argument wrong."""
    fusion_passes.register(Fusion("half_wrong", "for this test", (ASINH,), _match, _replace))
    yield
    del registry._fusions["half_wrong"]


def through_enabled(*args: Tensor) -> Any:
    with fusion_passes.enabled(reference_on_cpu=True):
        return torch.compile(two_sites)(*args)


def through_options(*args: Tensor) -> Any:
    return torch.compile(two_sites, options=fusion_passes.options(reference_on_cpu=True))(*args)


def through_the_function(*args: Tensor) -> Any:
    """The bisector puts the backend that it tests in the place of every name, and of functions unless told."""
    keep: Any = {"test_configs.bisect_keep_custom_backend_for_inductor": True}
    with inductor_config.patch(keep), fusion_passes.config.patch(reference_on_cpu=True):
        return torch.compile(two_sites, backend=fusion_passes_backend)(*args)


@pytest.mark.parametrize("door", [through_enabled, through_options, through_the_function])
def test_the_bisector_names_the_fusion_and_the_line(door: Any, half_wrong: None) -> None:
    args = torch.randn(8), torch.randn(8)
    first_site = []

    def works() -> bool:
        torch._dynamo.reset()
        right = [torch.allclose(a, b) for a, b in zip(door(*args), two_sites(*args))]
        first_site.append(right[0])
        return all(right)

    assert not works()
    found = CompilerBisector.do_bisect(works)
    assert found is not None and (found.backend, found.subsystem) == ("inductor", "post_grad_passes")
    name, _, line = (found.debug_info or "").partition(" at ")
    assert name == "fusion_passes.half_wrong"
    start = two_sites.__code__.co_firstlineno
    assert line == f"{__file__}:{start + 2}"
    assert all(first_site)
    switched_off = {record.reason for record in fusion_passes.report().refusals}
    assert switched_off == {"Inductor's bisector is running and has switched this site off"}


def test_passes_can_be_disabled_by_the_names_of_fusions(half_wrong: None) -> None:
    args = torch.randn(8), torch.randn(8)
    with inductor_config.patch(disabled_passes="fusion_passes.half_wrong"):
        torch.testing.assert_close(through_enabled(*args), two_sites(*args))
    assert fusion_passes.report().counts == {}
