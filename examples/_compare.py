"""What the examples share: where they run, a clock for the first and a later call, and the comparison with eager."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fusion_passes

# Relative error (L2) against eager that counts as equal.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def parser(text: str | None) -> argparse.ArgumentParser:
    """A parser that prints the docstring of an example as it is, with the option that all of them have."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--real", action="store_true", help="the width of the released model, in bfloat16, on a GPU")
    return made


def parsed(made: argparse.ArgumentParser, argv: Sequence[str] | None, tokens: int) -> argparse.Namespace:
    """The arguments, with as many tokens as are given, or by default `tokens`, or 4096 for the released width."""
    made.add_argument("--tokens", type=int, help=f"default: {tokens}, or 4096 with --real")
    args = made.parse_args(argv)
    args.tokens = args.tokens or (4096 if args.real else tokens)
    return args


def place(real: bool) -> tuple[str, torch.dtype]:
    """The device, and the dtype of the weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, torch.bfloat16 if real or device == "cuda" else torch.float32


def options(device: str) -> dict[str, Any]:
    """Options of the backend: without a GPU the graph is rewritten all the same, and the ops run their references."""
    return {"fusion_passes.reference_on_cpu": device == "cpu"}


def compiled(model: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The whole model under `torch.compile`, with nothing left over from an earlier compile, in the report neither."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(model, backend="fusion_passes", options=options(device), fullgraph=True)


def run(name: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of a call; printed are the times of the first call and of another one."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        result = call()
        if result.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    print(f"{name:<20} first call {times[0]:8.2f} s, then {1e3 * times[1]:8.2f} ms")
    return result


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of two tensors, relative to the second one (L2)."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def same(actual: torch.Tensor, expected: torch.Tensor, allowed: float | None = None) -> bool:
    """Whether the results agree, which is printed; within `TOLERANCE` of their dtype unless told."""
    found = error(actual, expected)
    equal = found <= (TOLERANCE[expected.dtype] if allowed is None else allowed)
    print(f"    relative error against eager {found:.1e}: {'equal to rounding' if equal else 'NOT equal'}")
    return equal


def whole(model: Callable[..., Any], device: str, inputs: dict[str, Any], allowed: float | None = None) -> bool:
    """Run a model eagerly and compiled, print the report, and say whether the results agree, as `same` does."""
    with torch.no_grad():
        expected = run("eager", lambda: _hidden(model(**inputs)))
        ours = compiled(model, device)
        actual = run("compiled", lambda: _hidden(ours(**inputs)))
    print(f"\n{fusion_passes.report()}\n")
    return same(actual, expected, allowed)


def _hidden(output: Any) -> torch.Tensor:
    found = getattr(output, "last_hidden_state", output)
    assert isinstance(found, torch.Tensor)
    return found
