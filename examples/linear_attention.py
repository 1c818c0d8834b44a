"""A Hugging Face model with linear attention through both doors: the backend, and `bind`.

    python examples/linear_attention.py                       # tiny, also without a GPU
    python examples/linear_attention.py --model kimi_linear --real --tokens 4096

The model has random weights and is compiled twice. As it is, its delta rule is traced as the model spells it and found
in the graph; bound, it is one node of the graph from the start. Both results are compared with the eager model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import _compare
import torch
from _compare import run, same

import fusion_passes
from fusion_passes import hf_models
from fusion_passes.transformers import bind


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0 if all results agree."""
    parser = _compare.parser(__doc__)
    parser.add_argument("--model", default="qwen3_next", choices=hf_models.NAMES)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2, help="the last one has full attention")
    parser.add_argument("--bound-only", action="store_true", help="skip the compile of the model as it is")
    args = parser.parse_args(argv)

    device, dtype = _compare.place(args.real)
    model, inputs = hf_models.build(
        args.model, dtype=dtype, layers=args.layers, seq=args.tokens, real=args.real, device=device
    )

    def call(f: Callable[..., Any]) -> Callable[[], torch.Tensor]:
        return lambda: f(**inputs).last_hidden_state

    print(f"{args.model}, {args.layers} layers, {args.tokens} tokens, {dtype} on {device}")
    agree = True
    with torch.no_grad():
        expected = run("eager", call(model))
        if not args.bound_only:
            agree &= same(run("compiled", call(_compare.compiled(model, device))), expected)
            print(f"\n{fusion_passes.report()}\n")
        with bind(model) as binding:
            print(binding)
            agree &= same(run("bound and compiled", call(_compare.compiled(model, device))), expected)
            print(f"\n{fusion_passes.report()}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
