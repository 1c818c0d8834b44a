"""The main job in small: an unmodified Hugging Face model, compiled, reported on and compared with eager."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fusion_passes.reports import report

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Relative error (L2) of the compiled model against eager that the demo accepts.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def model_names() -> list[str]:
    """The models that `build` knows."""
    from fusion_passes import hf_models

    return list(hf_models.NAMES)


def device() -> str:
    """The device to run on: "cuda" where a GPU is present, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def build(
    name: str, *, dtype: str | None, layers: int, seq: int, batch: int
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model with random weights and the keyword arguments of one forward.

    `dtype` is a key of `DTYPES`; None means bf16 on a GPU and fp32 on a CPU. Raises as `hf_models.build`.
    """
    from fusion_passes import hf_models

    chosen = DTYPES[dtype] if dtype else torch.bfloat16 if device() == "cuda" else torch.float32
    return hf_models.build(name, dtype=chosen, layers=layers, seq=seq, batch=batch, device=device())


def run(name: str, model: torch.nn.Module, inputs: dict[str, Any], *, dynamic: bool = False) -> int:
    """Compile the model, print what was fused and how far the result is from eager; 0 if they agree."""
    dtype = next(model.parameters()).dtype
    batch, tokens = inputs["input_ids"].shape
    print(f"{name}: {batch} x {tokens} tokens, {dtype}, on {device()}")
    options: dict[str, Any] = {"fusion_passes.reference_on_cpu": True} if device() == "cpu" else {}
    if options:
        print("No GPU here: the graph is rewritten all the same, and the fused ops run their PyTorch references.")
    with torch.no_grad():
        eager, seconds = _timed(lambda: model(**inputs))
        print(f"eager      {1e3 * seconds:9.1f} ms")
        compiled = torch.compile(
            model, backend="fusion_passes", options=options, fullgraph=True, dynamic=dynamic or None
        )
        fused, seconds = _timed(lambda: compiled(**inputs))
        print(f"first call {1e3 * seconds:9.1f} ms, compilation included")
        fused, seconds = _timed(lambda: compiled(**inputs))
        print(f"compiled   {1e3 * seconds:9.1f} ms")
    expected, actual = (out.last_hidden_state.double() for out in (eager, fused))
    error = float((actual - expected).norm() / expected.norm())
    print()
    report().show()
    print()
    agrees = error <= TOLERANCE[dtype]
    print(f"compiled against eager: relative error {error:.1e}, {'equal to rounding' if agrees else 'NOT equal'}")
    return 0 if agrees else 1


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start
