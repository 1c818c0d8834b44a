"""Programmatic dependent launch: every kernel waits before it touches memory, and Inductor's launches ask for it."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_passes import ops
from fusion_passes.arch import TABLE, by_name
from fusion_passes.lowering import Launch, Program, Target
from fusion_passes.ops._chunk_delta_rule_plan import plan as delta_rule_plan
from fusion_passes.ops.chunk_delta_rule import chunk_delta_rule
from fusion_passes.ops.gate_cumsum import plan
from fusion_passes.plans import operand_of
from tests.support import fake_cuda, sass

OP = torch.ops.fusion_passes.gate_cumsum.default
CONSTANTS = (2, 64, None, 1.0, 1.0, 20.0, False, "bnchk", None, None)


def kernels() -> list[Any]:
    """Every kernel of the package's ops that takes PDL, by its name."""
    modules = [import_module(f"{ops.__name__}.{info.name}") for info in pkgutil.iter_modules(ops.__path__)]
    found = (value for module in modules for name, value in vars(module).items() if name.endswith("_kernel"))
    chosen = {kernel for kernel in found if "PDL" in getattr(kernel, "arg_names", ())}
    return sorted(chosen, key=lambda kernel: kernel.__name__)


def launch_on(arch: str, **target: bool) -> Launch:
    raw, a_log = torch.empty(1, 128, 1, 4, 64, dtype=torch.bfloat16, device="meta"), torch.empty(1, 4, 64)
    launch = plan(Target(by_name(arch), int, **target), *map(operand_of, (raw, a_log, None, *CONSTANTS)))
    assert isinstance(launch, Launch)
    return launch


def test_all_kernels_are_looked_at() -> None:
    assert len(kernels()) >= 10


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.__name__)
def test_kernels_compute_nothing_but_addresses_before_they_wait(kernel: Any) -> None:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body
    assert isinstance(definition, ast.FunctionDef)
    statements = list(map(ast.unparse, definition.body))
    waiting = statements.index("begin(PDL)")
    calls = [node for ahead in definition.body[:waiting] for node in ast.walk(ahead) if isinstance(node, ast.Call)]
    assert {ast.unparse(call.func).rpartition(".")[2] for call in calls} <= {"program_id", "arange", "zeros", "to"}


def test_waiting_comes_before_any_access_to_memory(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia")
    launch = launch_on("sm_90")
    binary = sass.compile_launch(launch, "sm_90", tmp_path)
    assert launch.pdl and binary.count("ACQBULK") == 1 and binary.count("PREEXIT") == 1
    # Opcodes stand in the order in which they first appear.
    order = [name.partition(".")[0] for name in binary.instructions]
    assert order.index("ACQBULK") < min(order.index(access) for access in ("LDG", "STG"))


@pytest.mark.parametrize("arch", sorted(TABLE))
def test_only_on_gpus_that_have_it(arch: str) -> None:
    assert launch_on(arch).pdl == launch_on(arch, inlined=True).pdl == (arch in ("sm_90", "sm_100"))


def test_the_first_of_two_launches_starts_the_second(tmp_path: Path) -> None:
    """The prologue of a delta rule is launched as usual, and lets the scan start before it ends."""
    q, g = torch.empty(1, 4096, 32, 128, dtype=torch.bfloat16, device="meta"), torch.empty(1, 4096, 32, device="meta")
    numbers = (0.1, 1e-6, "log", 0.0, None, torch.bfloat16, False)
    arguments = map(operand_of, (q, q, q, g, g, None, None, None, None, *numbers))
    prologue, scan = Program.of(delta_rule_plan(Target(by_name("sm_90"), int), *arguments)).launches
    assert (prologue.pdl, scan.pdl) == (False, True)
    pytest.importorskip("triton.backends.nvidia")
    binary = sass.compile_launch(prologue, "sm_90", tmp_path)
    assert (binary.count("ACQBULK"), binary.count("PREEXIT")) == (0, 1)
    # What it computes behind that takes no registers ahead of it: three programs fit on a multiprocessor.
    assert binary.registers <= 168


def test_inductor_compiles_the_launch_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.require()

    def layer(raw: torch.Tensor, a_log: torch.Tensor) -> torch.Tensor:
        return OP(raw, a_log, None, *CONSTANTS).exp()

    raw, a_log = torch.empty(1, 128, 1, 4, 64, dtype=torch.bfloat16), torch.empty(1, 4, 64)
    written = fake_cuda.written_arguments(monkeypatch)
    code = fake_cuda.wrapper_code(layer, [raw, a_log])
    ours, stock = code.split("def gate_cumsum_kernel(")
    assert written == [["out_ptr"]]
    # Inductor's own kernels, defined after ours, are launched as ever.
    assert ours.count("'launch_pdl': True") == ours.count("'PDL': True") == 1 and "'launch_pdl': True" not in stock
    assert "gdc_wait()" in code and "triton_" in stock


def test_what_the_first_launch_writes_is_known_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.require()

    def layer(q: torch.Tensor, g: torch.Tensor) -> Any:
        return chunk_delta_rule(q, q, q, g, g)

    q, g = torch.empty(1, 128, 2, 64, dtype=torch.bfloat16), torch.empty(1, 128, 2)
    written = fake_cuda.written_arguments(monkeypatch)
    code = fake_cuda.wrapper_code(layer, [q, g])
    assert written == [["factors_ptr", "tiles_ptr"], ["o_ptr"]]
    first, second = code.split("def delta_rule_scan_kernel(")
    assert first.count("'LEADS': True") == 1 and code.count("'launch_pdl': True") == 1
    assert "gdc_launch_dependents()" in first and "gdc_wait()" in second
