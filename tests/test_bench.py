"""`python -m fusion_passes bench`: selection, contestants, measuring, exit status; with a clock for the CPU."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from fusion_passes import arch, benchmarking, hf_models
from fusion_passes.__main__ import main
from fusion_passes.bench import cases, cli, contestants, models, progress, results, runner
from fusion_passes.bench.limits import time_limit
from fusion_passes.bench.results import Entry, Row
from fusion_passes.benchmarking import Case, Timing
from fusion_passes.ops import _gate_cumsum_cases
from tests import gates

CPU = torch.device("cpu")
H200 = arch.by_name("sm_90")
GATE = _gate_cumsum_cases._case(2, 32, 128, "bhnck")


def clock(calls: Mapping[str, Callable[..., Any]], sets: Sequence[tuple[Any, ...]]) -> dict[str, Timing | Exception]:
    """Runs everything, and gives the first callable 1 us, the second 2 us and so on."""
    for call in calls.values():
        call(*sets[0])
    return {name: Timing(i, i, i, 10.0 * i) for i, name in enumerate(calls, 1)}


def negation(**changes: Any) -> Case:
    """A case that is quick to compile and in which there is nothing to fuse."""
    values: dict[str, Any] = {
        "name": "4 numbers", "op": lambda x: -x, "make": lambda device, generator: (torch.ones(4, device=device),),
        "bytes": 32, "flops": 4, "reference": torch.neg, "fusion": "gate_cumsum",
    }  # fmt: skip
    return Case(**{**values, **changes})


def absent() -> Callable[..., Any]:
    raise ImportError("No module named 'peer'")


# --- what is measured ------------------------------------------------------------------------------------------------


def test_every_op_that_declares_cases_is_found() -> None:
    found = cases.declared()
    assert [case.name for case in found["gate_cumsum"]][0] == "KDA 32x128 T=128 bhnck"
    assert not any(name.startswith("_") for name in found)


def test_other_packages_declare_cases_by_entry_point(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = cases.ENTRY_POINT_GROUP
    theirs = EntryPoint("their_op", f"{__name__}:their_cases", group)
    broken = EntryPoint("broken", "no_such_package:cases", group)
    ours = EntryPoint("gate_cumsum", f"{__name__}:their_cases", group)
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(their_cases=lambda: [negation()]))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [theirs, broken, ours])
    found = cases.declared()
    assert [case.name for case in found["their_op"]] == ["4 numbers"] and len(found["gate_cumsum"]) == 20
    assert "broken" not in found
    assert "broken = no_such_package:cases of group fusion_passes.cases is ignored" in caplog.text


def test_selection() -> None:
    both = cases.select(["gate_cumsum"], "T=512 b,8x1 ", "all")
    assert {case.name.split()[1] for _, case in both} == {"32x128", "32x1", "8x1"}
    chosen = cases.select(["gate_cumsum"], "GDN", "all")
    assert {name for name, _ in chosen} == {"gate_cumsum"} and len(chosen) == 8
    assert {case.name.split()[2] for _, case in cases.select(["gate_cumsum"], "KDA 32", "small")} == {"T=128", "T=512"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["gate_cumsun"],), "unknown op 'gate_cumsun'. Did you mean 'gate_cumsum'[?] Known: .*gate_cumsum"),
        ((["gate_cumsum"], "T=3"), "no case of gate_cumsum has 'T=3' in its name: there are KDA 32x128"),
        ((["gate_cumsum"], "KDA 32x128 T=16384", "small"), "every case with .* is large: --sizes all"),
    ],
)
def test_selections_that_are_empty_say_why(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cases.select(*arguments)


def test_baselines() -> None:
    known = contestants.known_baselines([GATE, _gate_cumsum_cases._case(2, 32, 128, "bnchk")])
    assert known == ["stock", "combo_kernels", "max_autotune", "eager", "fla"]
    assert contestants.parse_baselines(None, known) == known
    assert contestants.parse_baselines("eager, stock", known) == ["eager", "stock"]
    with pytest.raises(ValueError, match="unknown baseline 'stok'. Did you mean 'stock'[?] Known: stock, combo"):
        contestants.parse_baselines("eager,stok", known)


def test_contestants_are_compiled_as_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, Any]] = {}
    codes: list[int] = []

    def compile_(f: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
        asked[f.__code__.co_name] = arguments
        codes.append(id(f.__code__))
        return f

    monkeypatch.setattr(torch, "compile", compile_)
    case = negation(plain=torch.neg, peers={"fla": absent, "twice": lambda: lambda x: -x})
    names = ["stock", "combo_kernels", "max_autotune", "eager", "fla", "twice"]
    found, missing = contestants.contestants(case, names, CPU)
    assert list(found) == ["fused", "op", "stock", "combo_kernels", "max_autotune", "eager", "twice"]
    assert missing == {"fla": "not installed: No module named 'peer'"}
    assert asked["stock"] == {"dynamic": False, "fullgraph": True}
    assert asked["combo_kernels"]["options"] == {"combo_kernels": True}
    assert asked["max_autotune"]["mode"] == "max-autotune-no-cudagraphs"
    assert asked["fused"]["options"] == {"fusion_passes.reference_on_cpu": True}
    assert "options" not in contestants.ours(torch.device("cuda")) and len(set(codes)) == 4
    # Without a plain spelling there is nothing to compile, and without the name nothing to import.
    assert list(contestants.contestants(negation(), names, CPU)[0]) == ["op"]
    assert list(contestants.contestants(case, ["twice"], CPU)[0]) == ["fused", "op", "twice"]


# --- measuring a case ------------------------------------------------------------------------------------------------


def test_a_case_of_an_op() -> None:
    row = runner.measure("gate_cumsum", GATE, ["stock", "eager"], H200, CPU, clock)
    assert row.name == "gate_cumsum KDA 2x32 T=128 bhnck" and list(row.entries) == ["fused", "op", "stock", "eager"]
    assert row.entries["fused"].sites == {"gate_cumsum": 1} and not row.entries["fused"].note
    assert [entry.gpu_us for entry in row.entries.values()] == [1, 2, 3, 4]
    assert [entry.wall_us for entry in row.entries.values()] == [10, 20, 30, 40]
    assert all(entry.error is not None and entry.error <= (row.bound or 0) < 1e-6 for entry in row.entries.values())
    assert (row.bytes, row.flops, row.floor_us) == (6 * 8192, 20 * 8192, round(6 * 8192 / 4.25e6, 2))


def test_all_contestants_stay_compiled_beside_each_other() -> None:
    row = runner.measure("neg", negation(plain=lambda x: -x), ["stock"], H200, CPU, clock)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2 and list(row.entries) == ["fused", "op", "stock"]


def test_a_row_says_why_nothing_was_fused() -> None:
    sites = {"fused": {"gate_cumsum": 0}}
    row = runner.measure("neg", negation(plain=lambda x: -x), [], H200, CPU, clock)
    assert row.entries["fused"].sites == sites["fused"]
    assert row.entries["fused"].note == "left alone: no candidate was found"
    case = negation(plain=lambda x: x.cumsum(0), op=lambda x: x.cumsum(0), reference=lambda x: x.cumsum(0))
    row = runner.measure("cumsum", case, [], H200, CPU, clock)
    assert "left alone: the cumsum runs over an axis of 4" in row.entries["fused"].note


def test_wrong_results_have_no_times_and_are_not_timed() -> None:
    timed: list[str] = []

    def recording(calls: Mapping[str, Any], sets: Any) -> dict[str, Timing | Exception]:
        timed.extend(calls)
        return clock(calls, sets)

    case = negation(op=lambda x: -x * 1.01, plain=lambda x: -x, peers={"off": lambda: lambda x: -x * 2})
    row = runner.measure("neg", case, ["off", "eager"], H200, CPU, recording)
    assert row.entries["op"] == Entry(error=0.01, failed="relative error 1.0e-02 is above 1.2e-07")
    assert row.entries["off"].failed == "relative error 1.0e+00 is above 2.4e-07"
    assert timed == ["fused", "eager"] and row.gpu_us("op") is None
    row = runner.measure("neg", negation(op=lambda x: -x * 1.01, bound=0.02), [], H200, CPU, clock)
    assert row.gpu_us("op") == 1 and row.bound == 0.02


def test_what_raises_is_told_and_the_others_are_measured() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory\nat some place")

    def failing(calls: Mapping[str, Any], sets: Any) -> dict[str, Timing | Exception]:
        return {**clock(calls, sets), "eager": RuntimeError("cannot be captured")}

    case = negation(plain=lambda x: -x, peers={"peer": lambda: broken, "gone": absent})
    row = runner.measure("neg", case, ["eager", "peer", "gone"], H200, CPU, failing)
    assert row.entries["peer"].failed == "RuntimeError: out of memory"
    assert row.entries["eager"].failed == "RuntimeError: cannot be captured"
    assert row.entries["gone"].failed == "not installed: No module named 'peer'" and row.gpu_us("fused") == 1


def test_several_results_of_any_dtype() -> None:
    def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.to(torch.bfloat16), x.to(torch.float32)

    def make(device: torch.device, generator: torch.Generator) -> tuple[torch.Tensor]:
        return (torch.rand(64, generator=generator, device=device),)

    row = runner.measure("split", negation(op=split, make=make, reference=lambda x: (x, x)), [], H200, CPU, clock)
    assert 0 < (row.entries["op"].error or 0) < 2**-8 and row.bound == pytest.approx(2**-7, rel=0.1)


# --- whole models ----------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    last_hidden_state: torch.Tensor


class Model(torch.nn.Module):
    """Takes tokens and returns an object with `last_hidden_state`, as Hugging Face models do; has one gate."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.gate_inputs = gates.inputs(tokens=tokens)

    def forward(self, input_ids: torch.Tensor) -> Output:
        return Output(gates.gate(*self.gate_inputs))


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []

    def build(name: str, **arguments: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
        asked.append({"name": name, **arguments})
        ids = torch.zeros(arguments["batch"], arguments["seq"], dtype=torch.int64)
        return Model(arguments["seq"]), {"input_ids": ids}

    monkeypatch.setattr(hf_models, "build", build)
    return asked


def sample(call: Callable[[], Any]) -> models.Sample:
    call()
    return models.Sample(gpu_us=1500.0, wall_us=2000.0, kernels=7, peak_mb=11)


def test_a_model(small_model: list[dict[str, Any]]) -> None:
    row = models.measure("kimi_linear", models.Size(64, 1, 3), ["eager", "combo_kernels", "fla"], CPU, sample)
    (asked,) = small_model
    assert asked["real"] and asked["dtype"] == torch.bfloat16 and asked["device"] == CPU
    assert (asked["name"], asked["layers"], asked["seq"], asked["batch"]) == ("kimi_linear", 3, 64, 1)
    assert row.model and row.name == "kimi_linear T=64 B=1 layers=3"
    assert list(row.entries) == ["fused", "eager", "combo_kernels"]
    fused = row.entries["fused"]
    assert fused.sites == {"gate_cumsum": 1} and row.entries["eager"].sites is None
    assert (fused.gpu_us, fused.wall_us, fused.kernels, fused.peak_mb) == (1500, 2000, 7, 11)
    assert (fused.first_call_s or 0) > 0 and row.entries["eager"].error == 0


def test_a_model_that_is_wrong_has_no_times(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.TOLERANCE, torch.bfloat16, -1.0)
    row = models.measure("kimi_linear", models.Size(64, 1, 2), ["eager"], CPU, sample)
    assert all(entry.failed.startswith("relative error") for entry in row.entries.values())


def test_a_model_that_cannot_be_measured_says_so(small_model: Any) -> None:
    def refuse(call: Callable[[], Any]) -> models.Sample:
        raise RuntimeError("out of memory")

    row = models.measure("kimi_linear", models.Size(64, 1, 2), [], CPU, refuse)
    assert row.entries["fused"].failed == "RuntimeError: out of memory"


def test_contestants_of_a_model_that_take_too_long_are_stopped(small_model: Any) -> None:
    def slow(call: Callable[[], Any]) -> models.Sample:
        with contextlib.suppress(Exception):  # as a compiler does that carries on after an error
            time.sleep(60)
        return models.Sample(1.0, 1.0, 1, 1)

    row = models.measure("kimi_linear", models.Size(64, 1, 2), ["eager"], CPU, slow, ways=[], limit_s=0.2)
    assert row.entries["eager"].failed == "takes longer than 0.2 s"
    started = time.monotonic()
    with time_limit(60), time_limit(None):
        pass
    assert time.monotonic() - started < 1 and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_model_that_is_bound_and_decodes() -> None:
    """The prompt fills a cache of each contestant, and the step behind it is what counts."""
    pytest.importorskip("transformers")
    seen: list[int] = []

    def steps(call: Callable[[], Any]) -> models.Sample:
        for _ in range(3):
            cache = call().past_key_values
        seen.append(int(cache.get_seq_length(1)))
        return models.Sample(None, 2000.0, 7, 11, "no CUDA graph")

    size = models.Size(20, 2, 2, decode=True)
    small: dict[str, Any] = {"real": False, "dtype": torch.float32}
    quick: dict[str, Any] = {"fallback_by_default": True} if hasattr(inductor_config, "fallback_by_default") else {}
    with inductor_config.patch(quick):
        row = models.measure("olmo_hybrid", size, ["eager"], CPU, steps, ways=["bound"], **small)
    assert row.name == "olmo_hybrid decode T=20 B=2 layers=2" and list(row.entries) == ["bound", "eager"]
    assert row.ours == "bound" and row.weights_mb > 0 and seen == [24, 24]
    bound = row.entries["bound"]
    # Compiled, the step of one token is left to Inductor.
    assert bound.sites == {} and (bound.error or 0) < 1e-5
    assert bound.gpu_us is None and bound.note == "no CUDA graph" and not bound.failed


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command measures on the CPU with the fake clock; the list takes the names of the rows."""
    measured: list[str] = []

    def measure(op: str, case: Case, baselines: Any, on: arch.Architecture, device: torch.device, warm: bool) -> Row:
        measured.append(case.name)
        return real(op, case, baselines, on, device, clock, warm)

    real = runner.measure
    monkeypatch.setattr(cli, "_device", lambda: CPU)
    monkeypatch.setattr(cli, "_environment", lambda: {"gpu": "a CPU", "torch": torch.__version__})
    monkeypatch.setattr(arch, "of_device", lambda device: H200)
    monkeypatch.setattr(runner, "measure", measure)
    declared = {"neg": [negation(plain=torch.neg), negation(name="large", bytes=1 << 30)], "gate_cumsum": [GATE]}
    monkeypatch.setattr(cases, "declared", lambda: declared)
    return measured


def test_measuring_writes_json_a_table_and_progress(
    on_cpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "made" / "out.json"
    arguments = ["bench", "--op", "gate_cumsum", "neg", "--sizes", "small", "--baselines", "stock", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["fusion_passes", *arguments])
    assert main([*arguments, "--table"]) == 0
    printed = capsys.readouterr()
    assert on_cpu == ["KDA 2x32 T=128 bhnck", "4 numbers"]
    assert "| gate_cumsum KDA 2x32 T=128 bhnck | 0.0 | **1.0** | 2.0 | 3.0 | 1 % |" in printed.out
    lines = printed.err.splitlines()
    assert lines[0].startswith("[1/2, ") and "fused 1.00 (10.0), op 2.00 (20.0), stock 3.00 (30.0)" in lines[0]
    assert lines[1].startswith("[2/2, ") and "fused: left alone: no candidate was found" in lines[1]
    found = results.read(path)
    assert [row.case for row in found.rows] == on_cpu and found.environment["gpu"] == "a CPU"
    assert found.command == "python -m fusion_passes " + " ".join(arguments) and found.date.startswith("20")


def test_rows_are_written_as_they_come(on_cpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(op: str, case: Case, *rest: Any, warm: bool) -> Row:
        if case is GATE:
            raise KeyboardInterrupt
        return Row(op, case.name, {"op": Entry(1.0, 2.0, 0.0)})

    monkeypatch.setattr(runner, "measure", measure)
    path = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "--json", str(path)])
    assert [row.case for row in results.read(path).rows] == ["4 numbers", "large"]


def test_failing_rows_fail_the_command(
    on_cpu: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Row("neg", "x", {"fused": Entry(2.0, 3.0, 0.0, {"neg": 1}), "stock": Entry(1.0, 3.0, 0.0)})
    monkeypatch.setattr(runner, "measure", lambda *args, warm: slow)
    assert main(["bench", "--op", "neg", "--case", "4"]) == 1
    assert "bench: neg x: GPU time 2.0 us is 100 % above stock (1.0 us)" in capsys.readouterr().err


def test_models_on_the_command_line(
    on_cpu: list[str], small_model: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "measure", functools.partial(models.measure, clock=sample))
    arguments = ["bench", "--model", "qwen3_next", "--tokens", "64", "128", "--layers", "4", "--baselines", "eager"]
    assert main([*arguments, "--ways", "fused", "--limit", "300"]) == 0
    assert on_cpu == [] and [asked["seq"] for asked in small_model] == [64, 128]
    assert "| qwen3_next T=128 B=1 layers=4 | fused | 1.50 | 2.00 | 7 | 11 |" in capsys.readouterr().out


def test_list_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--op", "gate_cumsum"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and lines[1].split() == [
        "gate_cumsum", "KDA", "32x128", "T=128", "bnchk", "3.15", "MB", "0.010", "GFLOP", "stock", "spelling,", "fla"
    ]  # fmt: skip
    assert main(["bench", "--list"]) == 0
    assert f"models: {', '.join(hf_models.NAMES)}" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_an_error_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert "no CUDA GPU on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--op", "nothing"], "unknown op 'nothing'"),
        (["--model", "gpt2"], "unknown model 'gpt2'. Known: kimi_linear"),
        (["--case", "nowhere"], "has 'nowhere' in its name"),
        (["--baselines", "fastest"], "unknown baseline 'fastest'"),
        (["--ways", "bind"], "unknown way 'bind'. Did you mean 'bound'?"),
        (["--from", "missing.json"], "missing.json holds no benchmark results"),
        (["--compare", "missing.json", "other.json"], "missing.json holds no benchmark results"),
    ],
)
def test_bad_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_help_says_what_is_measured_and_how_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "CUDA-graph replays" in text and "exit status: 0" in text
    assert f"small: cases of {benchmarking.SMALL_BYTES >> 20} MiB and less" in text


def test_progress_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    shown = progress.Progress(2)
    with shown.measuring("first"):
        pass
    shown.finished("first [done]")
    printed = capsys.readouterr()
    assert printed.err.startswith("[1/2, 0 s] first [done]") and not printed.out
