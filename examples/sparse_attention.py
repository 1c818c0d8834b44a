"""A Hugging Face model with a sparse-attention indexer, compiled as it is and compared with eager.

    python examples/sparse_attention.py                       # tiny, also without a GPU
    python examples/sparse_attention.py --model deepseek_v32 --real --tokens 4096

In each layer an indexer scores every earlier token for every query, with heads of its own and weights per head, and
only the tokens with the highest scores take part in the attention. Its weights become `head_gate`, its scores
`index_score`, and the selection, from 1,024 tokens on, `topk_mask`. A prompt of no more tokens than a query may select
(2,048 in the released models, 64 in the tiny ones) needs no scores: `full_topk` takes the selection out, and the
indexer with it. Try `--tokens 48`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _compare
import torch

from fusion_passes import hf_models

MODELS = ("deepseek_v32", "glm_moe_dsa", "hy_v4")
# A score that is rounded to bfloat16 at another place may let another token in.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0 if the results agree."""
    parser = _compare.parser(__doc__)
    parser.add_argument("--model", default="glm_moe_dsa", choices=MODELS)
    parser.add_argument("--layers", type=int, default=1)
    args = _compare.parsed(parser, argv, tokens=96)

    device, dtype = _compare.place(args.real)
    model, inputs = hf_models.build(
        args.model, dtype=dtype, layers=args.layers, seq=args.tokens, real=args.real, device=device
    )
    print(f"{args.model}, {args.layers} layers, {args.tokens} tokens, {dtype} on {device}")
    return 0 if _compare.whole(model, device, inputs, ALLOWED[dtype]) else 1


if __name__ == "__main__":
    sys.exit(main())
