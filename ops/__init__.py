"""Fused ops: importing this package registers them all in `torch.ops.fusion_passes`."""

from __future__ import annotations

from fusion_passes.ops import (
    chunk_delta_rule,
    delta_rule_intra,
    gate_cumsum,
    head_gate,
    index_score,
    mla_kv_pack,
    qkv_split,
    rotate_pairs,
    topk_mask,
)

__all__ = [
    "chunk_delta_rule",
    "delta_rule_intra",
    "gate_cumsum",
    "head_gate",
    "index_score",
    "mla_kv_pack",
    "qkv_split",
    "rotate_pairs",
    "topk_mask",
]
