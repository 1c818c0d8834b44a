"""What to look for: one fusion per module, `FUSIONS` lists them all."""

from __future__ import annotations

from fusion_passes.patterns.chunk_delta_rule import FUSION as CHUNK_DELTA_RULE
from fusion_passes.patterns.delta_rule_intra import FUSION as DELTA_RULE_INTRA
from fusion_passes.patterns.full_topk import FUSION as FULL_TOPK
from fusion_passes.patterns.gate_cumsum import FUSION as GATE_CUMSUM
from fusion_passes.patterns.head_gate import FUSION as HEAD_GATE
from fusion_passes.patterns.index_score import FUSION as INDEX_SCORE
from fusion_passes.patterns.mla_kv_pack import FUSION as MLA_KV_PACK
from fusion_passes.patterns.qkv_split import FUSION as QKV_SPLIT
from fusion_passes.patterns.redundant_copy import FUSION as REDUNDANT_COPY
from fusion_passes.patterns.topk_mask import FUSION as TOPK_MASK

# First what makes others needless; copies come last: a larger fusion may read its operands through strides.
FUSIONS = (
    FULL_TOPK,
    CHUNK_DELTA_RULE,
    DELTA_RULE_INTRA,
    GATE_CUMSUM,
    HEAD_GATE,
    INDEX_SCORE,
    TOPK_MASK,
    MLA_KV_PACK,
    QKV_SPLIT,
    REDUNDANT_COPY,
)
