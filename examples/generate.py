"""Text generation of Hugging Face with a static cache and a compiled decoding step.

    python examples/generate.py                                # tiny, also without a GPU
    python examples/generate.py --model kimi_linear --real --prompt 1024 --new 128

`generate` compiles the decoding step itself where the cache is static; `CompileConfig` names the backend. The prompt is
run eagerly there, which is where `bind` matters: the delta rule of the prompt is one op instead of a loop in Python.
That of a single token stays as it is and is compiled with the rest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig

import fusion_passes
from fusion_passes import hf_models
from fusion_passes.transformers import bind

MODELS = ("kimi_linear", "qwen3_next", "qwen3_5", "olmo_hybrid")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0 if the tokens are those of the eager model, which only float32 guarantees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="olmo_hybrid", choices=MODELS)
    parser.add_argument("--real", action="store_true", help="the width of the released model, in bfloat16")
    parser.add_argument("--prompt", type=int, default=20, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=8, help="tokens to generate")
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.real else torch.float32
    model, prompt = _language_model(args.model, args.real, dtype, device, args.batch, args.prompt)
    # CUDA graphs on a GPU. The field with the underscore lets `generate` compile on a CPU, for tests.
    compile_config: Any = CompileConfig(
        backend="fusion_passes", mode="reduce-overhead" if device == "cuda" else "default", fullgraph=True
    )
    compile_config._compile_all_devices = True
    options = {"max_new_tokens": args.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(name: str, **how: Any) -> torch.Tensor:
        for attempt in ("first", "again"):
            start = time.perf_counter()
            tokens = model.generate(prompt, **options, **how).cpu()[:, args.prompt :]
            print(f"{name:<20} {attempt}: {time.perf_counter() - start:7.2f} s for {tokens.numel()} tokens")
        return tokens

    print(f"{args.model}: prompt of {args.batch} x {args.prompt} tokens, {dtype} on {device}")
    expected = generate("eager", disable_compile=True)
    with bind(model) as binding:
        actual = generate("bound and compiled", cache_implementation="static", compile_config=compile_config)
        print(f"\n{binding}\n\n{fusion_passes.report()}\n")
    equal = float((actual == expected).double().mean())
    print(f"tokens as without fusion_passes: {equal:.0%}")
    # In bfloat16 one rounding may tip the choice between two tokens of random weights, and all that follow.
    return 0 if equal == 1 or dtype != torch.float32 else 1


def _language_model(
    name: str, real: bool, dtype: torch.dtype, device: str, batch: int, tokens: int
) -> tuple[Any, torch.Tensor]:
    """A model with random weights and a language modelling head, and a prompt."""
    base, inputs = hf_models.build(name, dtype=dtype, real=real, batch=batch, seq=tokens, device=device)
    config: Any = base.config
    config.use_cache = True
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False), inputs["input_ids"]


if __name__ == "__main__":
    sys.exit(main())
