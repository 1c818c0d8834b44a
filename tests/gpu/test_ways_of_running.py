"""Ways of running fused code on a GPU: Inductor's modes, inference mode, autocast, regions, exported programs."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

import fusion_passes
from fusion_passes import benchmarking, hf_models
from tests.support.sites import SITES, WIDE, Site, _operands, fusion_of
from tests.test_ways_of_running import Layer, compiled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
TOKENS = 128
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# What the products of the kernels add to the error of float32.
ALLOWED = 2e-5


def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule in chunks of 64 tokens, without a tensor that is made on another device."""
    q, k, v, g, beta = (x.transpose(1, 2).unflatten(2, (-1, 64)) for x in (q, k, v, g, beta))
    sums, strength = g.cumsum(-1), beta[..., None]
    decay = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril()
    sides = torch.cat([v, k * sums.exp()[..., None]], -1) * strength
    system = (k * strength @ k.mT * decay).tril(-1)
    u, w = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True).split([64, 64], -1)
    state, outputs = q.new_zeros(*q.shape[:2], 64, 64), []
    for i in range(q.shape[2]):
        new = u[:, :, i] - w[:, :, i] @ state
        total = sums[:, :, i, :, None]
        outputs.append((q[:, :, i] * total.exp()) @ state + (q[:, :, i] @ k[:, :, i].mT * decay[:, :, i]) @ new)
        state = state * total[..., -1:, :].exp() + (k[:, :, i] * (total[..., -1:, :] - total).exp()).mT @ new
    return torch.stack(outputs, 2).flatten(2, 3).transpose(1, 2)


# The spellings of the delta rule among the sites make tensors on the CPU.
CASES = {name: site for name, site in SITES.items() if "delta_rule" not in name}
CASES["chunk_delta_rule"] = Site(rule, (WIDE, WIDE, WIDE, (1, "t", 2), (1, "t", 2)), draw=_operands)
FUNCTIONAL = [name for name, site in CASES.items() if not site.writes]


def own(name: str) -> dict[str, Any]:
    return {
        "fusions": fusion_of(name), "always_profitable": True, "strict": True, "reference_on_cpu": DEVICE == "cpu"
    }  # fmt: skip


def inputs(name: str, seed: int = 0) -> list[Tensor]:
    return [x.to(DEVICE) for x in CASES[name].inputs(TOKENS, seed)]


def outcome(call: Callable[..., Any], args: list[Tensor], wide: bool = False) -> list[Tensor]:
    """Results and arguments, which a call may write to."""
    given = [x.double() if wide else x.clone() for x in args]
    return [*tree_leaves(call(*given)), *given]


def check(name: str, actual: list[Tensor], args: list[Tensor]) -> None:
    """Results are as near to float64 as those of eager code, and float8 has the same bits."""
    function = CASES[name].function
    for a, eager, exact in zip(actual, outcome(function, args), outcome(function, args, wide=True), strict=True):
        assert (a.shape, a.dtype, a.device) == (eager.shape, eager.dtype, eager.device)
        if a.dtype.itemsize == 1:
            assert torch.equal(a.view(torch.uint8), eager.view(torch.uint8))
        else:
            bound = max(2 * benchmarking.relative_error(eager, exact), ALLOWED)
            assert benchmarking.relative_error(a, exact) <= bound


def found(name: str, call: Callable[[], Any]) -> int:
    """Sites that `call` adds to the report."""
    before = fusion_passes.report().counts[name]
    call()
    return fusion_passes.report().counts[name] - before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_modes(name: str, mode: str) -> None:
    """The first call compiles; of CUDA graphs the second one records, and the third one replays."""
    from torch._inductor.utils import run_and_get_code

    call = torch.compile(CASES[name].function, backend="fusion_passes", mode=mode, fullgraph=True)
    with torch.no_grad(), fusion_passes.config.patch(**own(name)):
        codes: list[str] = []
        for seed in range(4):
            args = inputs(name, seed)
            given = [x.clone() for x in args]
            if seed == 0:
                result, codes = run_and_get_code(call, *given)
            else:
                result = call(*given)
            check(name, [*tree_leaves(result), *given], args)
            del result
    assert DEVICE == "cpu" or "torch.ops.fusion_passes" not in codes[0]
    assert fusion_passes.report().counts[fusion_of(name)] == 1
    if not CASES[name].writes:
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_inference_mode(name: str) -> None:
    call, args = torch.compile(CASES[name].function, backend="fusion_passes", fullgraph=True), inputs(name)
    with torch.inference_mode(), fusion_passes.config.patch(**own(name)):
        assert found(name, lambda: check(name, outcome(call, args), args)) == 1


def test_autocast() -> None:
    """The projection is rounded to bfloat16, and so read by the fused op."""
    layer, x = Layer().to(DEVICE), torch.randn(2, TOKENS, 64, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16), fusion_passes.config.patch(**own("gate_cumsum")):
        assert layer.proj(x).dtype == torch.bfloat16
        result: list[Tensor] = []
        assert found("gate_cumsum", lambda: result.append(compiled(layer)(x))) == 1
        torch.testing.assert_close(result[0], layer(x), rtol=1e-2, atol=1e-3)


def test_regions_of_a_model() -> None:
    """`nn.Module.compile` for each layer: three equal ones are one graph, and pay for one search."""
    pytest.importorskip("transformers")
    model, tokens = hf_models.build("kimi_linear", dtype=torch.float32, layers=4, seq=TOKENS, device=DEVICE)
    counter = CompileCounterWithBackend("fusion_passes")
    with torch.no_grad(), fusion_passes.config.patch(strict=True, reference_on_cpu=DEVICE == "cpu"):
        expected = model(**tokens).last_hidden_state
        for layer in model.get_submodule("layers").children():
            layer.compile(backend=counter, fullgraph=True)
        actual: list[Tensor] = []
        assert found("chunk_delta_rule", lambda: actual.append(model(**tokens).last_hidden_state)) == 1
    assert counter.frame_count == 2  # linear attention, and the full attention of the last layer
    assert benchmarking.relative_error(actual[0], expected) < 1e-4


def test_activations_wait_on_the_cpu() -> None:
    """What a compiled region saves for its backward pass is offloaded; the scores in it are fused all the same."""
    scores, args = CASES["index_score"].function, inputs("index_score")

    def loss(weight: Tensor) -> Tensor:
        with torch.no_grad():
            chosen = scores(*args)
        return (chosen * weight.exp()).square().sum()

    def gradient(call: Callable[[Tensor], Tensor]) -> Tensor:
        weight = torch.linspace(-1, 1, 24, device=DEVICE, requires_grad=True)
        call(weight).backward()
        assert weight.grad is not None
        return weight.grad

    offloaded: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        offloaded.append(saved.numel())
        return saved.cpu()

    with fusion_passes.config.patch(**own("index_score")):
        call = torch.compile(loss, backend="fusion_passes", fullgraph=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.to(DEVICE)):
            actual = gradient(call)
    assert max(offloaded) >= 24
    assert fusion_passes.report().counts["index_score"] == 1
    torch.testing.assert_close(actual, gradient(loss), rtol=1e-4, atol=1e-4)


class Together(torch.nn.Module):
    """Several of the functions above, each with arguments of its own."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def forward(self, args: list[list[Tensor]]) -> list[list[Tensor]]:
        return [tree_leaves(CASES[name].function(*given)) for name, given in zip(self.names, args)]


def exported(*names: str) -> tuple[torch.export.ExportedProgram, list[list[Tensor]]]:
    args = [inputs(name) for name in names]
    with torch.no_grad():
        return torch.export.export(Together(*names), (args,)), args


def check_all(names: tuple[str, ...], results: list[list[Tensor]], args: list[list[Tensor]]) -> None:
    for name, result, given in zip(names, results, args, strict=True):
        check(name, [*result, *given], given)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_exported_programs(name: str) -> None:
    program, args = exported(name)
    fused = fusion_passes.apply(program, expect={name: 1}, **own(name))
    stream = io.BytesIO()
    torch.export.save(fused, stream)
    stream.seek(0)
    for module in (fused.module(), torch.export.load(stream).module()):
        check_all((name,), module(args), args)


LOADED_ALONE = """
import sys, torch
found = torch._inductor.aoti_load_package(sys.argv[1])(torch.load(sys.argv[2]))
assert not any(name.startswith("fusion_passes") for name in sys.modules)
torch.save(found, sys.argv[3])
"""

PACKAGES = (("mla_kv_pack",), tuple(name for name in FUNCTIONAL if name != "mla_kv_pack"))


LOADED_AT_ALL = """
import sys, torch
torch._inductor.aoti_load_package(sys.argv[1])(torch.ones(8, device="cuda"))
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A C++ compiler that links the C++ library as it is shared by all.

    One that copies it into what it links makes packages that cannot be loaded: the two libraries in the process take
    each other's locales for their own.
    """
    library, program = tmp_path / "linked.so", "#include <iostream>\nvoid say() { std::cout << 1; }\n"
    for candidate in filter(None, (os.environ.get("CXX"), shutil.which("g++"))):
        link = [candidate, "-x", "c++", "-", "-shared", "-fPIC", "-o", str(library)]
        if subprocess.run(link, input=program, text=True).returncode == 0 and b"libstdc++.so" in library.read_bytes():
            monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, candidate))
            return
    pytest.skip("AOTInductor needs a C++ compiler that links libstdc++ dynamically")


@pytest.fixture
def packages_can_be_built(tmp_path: Path, compiler: None) -> None:
    """Skips where AOTInductor's package of nothing cannot be built, or where a process that loads it dies."""
    program = torch.export.export(torch.nn.Identity(), (torch.ones(8, device=DEVICE),))
    try:
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "nothing.pt2"))
    except Exception as problem:
        pytest.skip(f"AOTInductor builds nothing here: {str(problem).strip()[:500]}")
    command = [sys.executable, "-c", LOADED_AT_ALL.replace("cuda", DEVICE), path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["nothing"]
        pytest.skip(f"PyTorch cannot load AOTInductor's package of nothing here ({done.returncode}): {said[-1][:300]}")


@pytest.mark.parametrize("names", PACKAGES, ids=["float8", "float32"])
def test_packages_of_aot_inductor(names: tuple[str, ...], tmp_path: Path, packages_can_be_built: None) -> None:
    """The kernels are a part of the package: a process that does not know this one's code gives the same."""
    program, args = exported(*names)
    settings = {**own(names[0]), "fusions": ",".join(names), "expect": dict.fromkeys(names, 1)}
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "m.pt2"), inductor_configs=fusion_passes.options(**settings)
    )
    results = torch._inductor.aoti_load_package(path)(args)
    check_all(names, results, args)
    if DEVICE == "cpu":
        return  # there the ops stay calls
    torch.save(args, tmp_path / "args.pt")
    command = [sys.executable, "-c", LOADED_ALONE, path, str(tmp_path / "args.pt"), str(tmp_path / "found.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    check_all(names, torch.load(tmp_path / "found.pt"), args)
