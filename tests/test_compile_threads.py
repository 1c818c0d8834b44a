"""Compiles in several threads: each with its own settings, and a backward pass compiled in another one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import fusion_passes
from tests.support.sites import SITES

ON_CPU: dict[str, Any] = {"fusion_passes.reference_on_cpu": True, "fusion_passes.strict": True}
# By site the fusions that a thread chooses, and how often it is found.
CHOSEN = {"full_topk": ("default", 1), "qkv_split": ("default,-qkv_split", 0), "head_gate": ("head_gate", 1)}


def compiled(function: Callable[..., Any], fusions: str = "default") -> Callable[..., Any]:
    options = {**ON_CPU, "fusion_passes.fusions": fusions, "fusion_passes.always_profitable": True}
    return torch.compile(function, backend="fusion_passes", options=options, fullgraph=True)


def sites(names: Iterable[str]) -> dict[str, int]:
    counts = fusion_passes.report().counts
    return {name: counts[name] for name in names}


def test_threads_with_settings_of_their_own() -> None:
    started, before = threading.Barrier(len(CHOSEN)), sites(CHOSEN)

    def run(name: str) -> None:
        arguments = SITES[name].inputs(24)
        with torch.no_grad():
            started.wait()
            found = compiled(SITES[name].function, CHOSEN[name][0])(*arguments)
            torch.testing.assert_close(found, SITES[name].function(*arguments))

    with ThreadPoolExecutor(len(CHOSEN)) as pool:
        list(pool.map(run, CHOSEN))
    assert sites(CHOSEN) == {name: before[name] + wanted for name, (_, wanted) in CHOSEN.items()}


class Shown(torch.autograd.Function):
    """Its backward pass selects all entries of a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.full_like(x, 2.0).scatter(-1, x.topk(x.shape[-1]).indices, 3.0) * gradient


def test_a_backward_pass_that_another_thread_compiles() -> None:
    """With known sizes the backward graph is compiled when it is first needed; the settings are those of before."""

    def function(x: Tensor) -> Tensor:
        return Shown.apply(x).sin().sum(0)

    def gradient(run: Callable[..., Any]) -> tuple[Tensor, list[int]]:
        x = torch.linspace(-1, 1, 48).view(4, 12).requires_grad_()
        counts = [sites(["full_topk"])["full_topk"]]
        loss = run(x).square().sum()
        counts += sites(["full_topk"]).values()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        counts += sites(["full_topk"]).values()
        assert x.grad is not None
        return x.grad, [count - counts[0] for count in counts]

    expected, _ = gradient(function)
    actual, counts = gradient(compiled(function))
    assert counts == [0, 0, 1]
    torch.testing.assert_close(actual, expected)
