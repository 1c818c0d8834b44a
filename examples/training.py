"""The Trainer of Hugging Face with `torch_compile=True`, in a block of `fusion_passes.enabled()`.

    python examples/training.py                               # tiny, also without a GPU
    python examples/training.py --model kimi_linear --real --tokens 1024

Accelerate takes no names of backends but those that it knows, so that `torch_compile_backend="fusion_passes"` is an
error. `enabled()` gives the pass to its Inductor compiles instead; they happen at the first step, inside the block.

The fused ops have no gradient: in the graphs of a training a site is replaced only where the backward pass needs
nothing of it, and refused elsewhere. The losses are those of the same training without compilation. A Trainer does not
compile its evaluations; a model that `model.compile(backend="fusion_passes")` compiled in place stays so for them.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import _compare
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import fusion_passes
from fusion_passes import hf_models

MODELS = hf_models.LINEAR_ATTENTION
# Differences of losses, relative: bfloat16 weights are rounded after every step.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0 if the losses with and without fusion_passes are equal to rounding."""
    parser = _compare.parser(__doc__)
    parser.add_argument("--model", default="olmo_hybrid", choices=MODELS)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args(argv)

    device, dtype = _compare.place(args.real)
    print(f"{args.model}, {args.layers} layers, {args.tokens} tokens, {dtype} on {device}")
    expected = _losses("without", args, dtype, compile_it=False)
    torch._dynamo.utils.counters.clear()  # of the report
    with fusion_passes.enabled(reference_on_cpu=device == "cpu"):
        actual = _losses("with fusion_passes", args, dtype, compile_it=True)
    print(f"\n{fusion_passes.report()}\n")
    equal = all(math.isclose(a, b, rel_tol=ALLOWED[dtype]) for a, b in zip(actual, expected))
    print(f"losses {'equal to rounding' if equal else 'NOT equal'}")
    return 0 if equal else 1


def _losses(name: str, args: Any, dtype: torch.dtype, compile_it: bool) -> list[float]:
    """The loss of every step of a training."""
    base, _ = hf_models.build(args.model, dtype=dtype, layers=args.layers, real=args.real)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(base.config, dtype=dtype, attn_implementation="sdpa")
    ids = torch.randint(3, hf_models.VOCAB, (2 * args.steps, args.tokens))
    data = [{"input_ids": row, "labels": row} for row in ids]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _environment():
        how = TrainingArguments(
            folder, torch_compile=compile_it, max_steps=args.steps, per_device_train_batch_size=2, learning_rate=1e-3,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(model, how, train_dataset=data)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    text = ", ".join(f"{loss:.4f}" for loss in losses)
    print(f"{name:<20} {time.perf_counter() - start:8.2f} s, losses {text}")
    return losses


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Put the environment back: arguments of a Trainer say there what is to be compiled, and the next one reads it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    sys.exit(main())
