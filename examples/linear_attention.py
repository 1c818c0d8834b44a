"""A Hugging Face model with linear attention through both doors: the backend, and `bind`.

    python examples/linear_attention.py                       # tiny, also without a GPU
    python examples/linear_attention.py --model kimi_linear --real --tokens 4096

The model has random weights and is compiled twice. As it is, its delta rule is traced as the model spells it and found
in the graph; bound, it is one node of the graph from the start. Both results are compared with the eager model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

import fusion_passes
from fusion_passes import hf_models
from fusion_passes.transformers import bind

# Relative error (L2) against eager that counts as equal.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0 if all results agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3_next", choices=hf_models.NAMES)
    parser.add_argument("--real", action="store_true", help="the width of the released model, in bfloat16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2, help="the last one has full attention")
    parser.add_argument("--bound-only", action="store_true", help="skip the compile of the model as it is")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.real or device == "cuda" else torch.float32
    model, inputs = hf_models.build(
        args.model, dtype=dtype, layers=args.layers, seq=args.tokens, real=args.real, device=device
    )
    # Without a GPU the graph is rewritten all the same, and the ops run their references.
    options = {"fusion_passes.reference_on_cpu": device == "cpu"}

    def compiled() -> Callable[..., torch.Tensor]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()  # of the report
        whole = torch.compile(model, backend="fusion_passes", options=options, fullgraph=True)
        return lambda: whole(**inputs).last_hidden_state

    print(f"{args.model}, {args.layers} layers, {args.tokens} tokens, {dtype} on {device}")
    agree = True
    with torch.no_grad():
        expected = _run("eager", lambda: model(**inputs).last_hidden_state)
        if not args.bound_only:
            agree &= _same(_run("compiled", compiled()), expected)
            print(f"\n{fusion_passes.report()}\n")
        with bind(model) as binding:
            print(binding)
            agree &= _same(_run("bound and compiled", compiled()), expected)
            print(f"\n{fusion_passes.report()}")
    return 0 if agree else 1


def _run(name: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of the first call, and the times of that and of another one."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        result = call()
        if result.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    print(f"{name:<20} first call {times[0]:8.2f} s, then {1e3 * times[1]:8.2f} ms")
    return result


def _same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    equal = error <= TOLERANCE[expected.dtype]
    print(f"    relative error against eager {error:.1e}: {'equal to rounding' if equal else 'NOT equal'}")
    return equal


if __name__ == "__main__":
    sys.exit(main())
