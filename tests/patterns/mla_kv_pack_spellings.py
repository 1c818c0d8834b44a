"""Spellings of the MLA key and value, as different engineers would write them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.patterns.mla_kv_pack_cases import E4, E5, HEAD, HEADS, NOPE, PE, SCALE, Table, V, entry

SPELLINGS: Table = {}

TOTAL = NOPE + PE


def project(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """k_nope and v, windows of one GEMM output."""
    kv = (x @ w).view(*x.shape[:-1], HEADS, HEAD)
    return kv[..., :NOPE], kv[..., NOPE:]


@entry(SPELLINGS)
def serving_call_site(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Slices, an empty tensor, two assignments, casts."""
    kv = (x @ w).view(-1, HEADS, HEAD)
    k_nope, v = kv[..., :NOPE], kv[..., NOPE:]
    k = torch.empty(kv.shape[0], HEADS, TOTAL, dtype=kv.dtype, device=kv.device)
    k[..., :NOPE] = k_nope
    k[..., NOPE:] = pe.unsqueeze(1)
    return k.to(E4), v.to(E4)


@entry(SPELLINGS, pe_shape="t1r")
def copies_into_new_empty(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """`copy_` into slices; the window sizes come from a split."""
    k_nope, v = (x @ w).view(-1, HEADS, HEAD).split([NOPE, V], dim=-1)
    k = k_nope.new_empty(k_nope.shape[0], HEADS, TOTAL)
    k[:, :, :NOPE].copy_(k_nope)
    k[:, :, NOPE:].copy_(pe)
    return k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)


@entry(SPELLINGS, pe_shape="t1r")
def concatenation(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """cat with an expanded k_pe."""
    k_nope, v = project(x, w)
    return torch.cat([k_nope, pe.expand(-1, HEADS, -1)], dim=-1).to(E4), v.to(E4)


@entry(SPELLINGS)
def zeros_and_assignment(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """new_zeros that is written over completely."""
    k_nope, v = project(x, w)
    k = x.new_zeros(x.shape[0], HEADS, TOTAL)
    k[..., :NOPE], k[..., NOPE:] = k_nope, pe[:, None]
    return k.to(dtype=E4), v.to(dtype=E4)


@entry(SPELLINGS)
def float8_buffer(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """The parts are cast first and written into a float8 buffer."""
    k_nope, v = project(x, w)
    k = torch.empty(x.shape[0], HEADS, TOTAL, dtype=E4, device=x.device)
    k[..., :NOPE] = k_nope.to(E4)
    k[..., NOPE:] = pe.to(E4).unsqueeze(1)
    return k, v.to(E4)


@entry(SPELLINGS)
def casting_assignment(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """The assignment to a float8 buffer casts by itself, the value's `copy_` too."""
    k_nope, v = project(x, w)
    k = torch.empty(x.shape[0], HEADS, TOTAL, dtype=E4, device=x.device)
    k[..., :NOPE] = k_nope
    k[..., NOPE:] = pe.unsqueeze(1)
    packed = torch.empty(v.shape, dtype=E4, device=x.device)
    packed.copy_(v)
    return k, packed


@entry(SPELLINGS)
def concatenation_of_casts(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """cat of float8 parts."""
    k_nope, v = project(x, w)
    shared = pe.to(E4).unsqueeze(1).expand(-1, HEADS, -1)
    return torch.cat((k_nope.to(E4), shared), -1), v.to(E4)


@entry(SPELLINGS, pe_first=True)
def rotary_part_first(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """The shared part before the other one."""
    k_nope, v = project(x, w)
    return torch.cat([pe.unsqueeze(1).repeat(1, HEADS, 1), k_nope], -1).to(E4), v.to(E4)


@entry(SPELLINGS, pe_first=True)
def rotary_part_first_by_assignment(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Written from behind."""
    k_nope, v = project(x, w)
    k = torch.empty_like(k_nope.new_empty(x.shape[0], HEADS, TOTAL))
    k[..., PE:] = k_nope
    k[..., :PE] = pe[:, None, :]
    return k.to(E4), v.to(E4)


@entry(SPELLINGS, batch=2, head_first=True, v_head_first=True, pe_shape="1tr")
def heads_first_as_in_hugging_face(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, T, D] as the Hugging Face models build it; the value keeps the projection's layout."""
    kv = (x @ w).view(x.shape[0], x.shape[1], HEADS, HEAD).transpose(1, 2)
    k_nope, v = torch.split(kv, [NOPE, V], dim=-1)
    k = k_nope.new_empty(*k_nope.shape[:-1], TOTAL)
    k[:, :, :, :NOPE] = k_nope
    k[:, :, :, NOPE:] = pe
    return k.to(E4), v.to(E4)


@entry(SPELLINGS, batch=2, head_first=True, pe_shape="1tr")
def heads_first_concatenation(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """cat in [B, H, T, D], the value made contiguous there."""
    kv = (x @ w).unflatten(-1, (HEADS, HEAD)).permute(0, 2, 1, 3)
    k = torch.cat([kv[..., :NOPE], pe.expand(-1, HEADS, -1, -1)], -1)
    return k.to(E4).contiguous(), kv[..., NOPE:].contiguous().to(E4)


@entry(SPELLINGS, batch=2)
def batches_of_tokens(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T, H, D]."""
    k_nope, v = project(x, w)
    return torch.cat([k_nope, pe[:, :, None].expand(-1, -1, HEADS, -1)], -1).to(E4), v.to(E4)


@entry(SPELLINGS, batch=1, head_first=True, pe_shape="1tr")
def transposed_behind_the_cast(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Built token by token and then turned to heads first."""
    k_nope, v = project(x, w)
    k = torch.cat([k_nope, pe.transpose(1, 2).expand(-1, -1, HEADS, -1)], -1)
    return k.to(E4).transpose(1, 2), v.to(E4).transpose(1, 2)


@entry(SPELLINGS, batch=2, head_first=True, pe_shape="1tr")
def transposed_before_the_cast(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Turned to heads first between building and casting, with a copy."""
    k_nope, v = project(x, w)
    k = torch.cat([k_nope, pe.transpose(1, 2).expand(-1, -1, HEADS, -1)], -1)
    return k.transpose(1, 2).contiguous().to(E4), v.transpose(1, 2).contiguous().to(E4)


@entry(SPELLINGS, flat=True)
def flattened_before_the_cast(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Heads and columns are one axis when the cast comes."""
    k_nope, v = project(x, w)
    k = torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1)
    return k.reshape(-1, HEADS * TOTAL).to(E4), v.reshape(-1, HEADS * V).to(E4)


@entry(SPELLINGS)
def rows_of_token_and_head(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Assignments through a view in which token and head are one axis."""
    kv = (x @ w).view(-1, HEAD)
    k = torch.empty(x.shape[0], HEADS, TOTAL, dtype=x.dtype, device=x.device)
    rows = k.view(-1, TOTAL)
    rows[:, :NOPE] = kv[:, :NOPE]
    k[:, :, NOPE:] = pe.unsqueeze(1)
    return k.to(E4), kv[:, NOPE:].to(E4).view(-1, HEADS, V)


@entry(SPELLINGS, pe_shape="thr")
def expanded_by_the_caller(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """k_pe arrives with stride 0."""
    k_nope, v = project(x, w)
    return torch.cat([k_nope, pe], -1).to(E4), v.to(E4)


@entry(SPELLINGS)
def repeated_by_interleaving(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """repeat_interleave in place of expand."""
    k_nope, v = project(x, w)
    return torch.cat([k_nope, pe.unsqueeze(1).repeat_interleave(HEADS, dim=1)], 2).to(E4), v.to(E4)


@entry(SPELLINGS)
def narrowed_windows(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """narrow on both sides."""
    kv = (x @ w).view(-1, HEADS, HEAD)
    k = torch.zeros(x.shape[0], HEADS, TOTAL, dtype=x.dtype)
    k.narrow(-1, 0, NOPE).copy_(kv.narrow(-1, 0, NOPE))
    k.narrow(-1, NOPE, PE).copy_(pe.view(-1, 1, PE))
    return k.to(E4), kv.narrow(-1, NOPE, V).to(E4)


@entry(SPELLINGS, apart=True)
def slice_scatter_calls(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """The functional form."""
    k_nope, v = project(x, w)
    k = torch.zeros(x.shape[0], HEADS, TOTAL, dtype=x.dtype)
    k = torch.slice_scatter(k, k_nope, dim=2, start=0, end=NOPE)
    k = torch.slice_scatter(k, pe.unsqueeze(1).expand(-1, HEADS, -1), dim=2, start=NOPE)
    return k.to(E4), v.to(E4)


@entry(SPELLINGS, scales=2, k=lambda k: k * SCALE, v=lambda v: v * 0.75)
def two_scales_in_float32(x: Tensor, w: Tensor, pe: Tensor, ks: Tensor, vs: Tensor) -> tuple[Tensor, Tensor]:
    """Widened, multiplied by a scale each, cast."""
    k_nope, v = project(x, w)
    k = torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1)
    return (k.float() * ks).to(E4), (v.float() * vs).to(E4)


@entry(SPELLINGS, scales=1, k=lambda k: k / SCALE, v=lambda v: v / SCALE)
def divided_by_one_scale(x: Tensor, w: Tensor, pe: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for both, divided by."""
    k_nope, v = project(x, w)
    k = torch.empty(x.shape[0], HEADS, TOTAL, dtype=torch.float32)
    k[..., :NOPE] = k_nope
    k[..., NOPE:] = pe.unsqueeze(1)
    return (k / scale).to(E4), (v.float() / scale).to(E4)


@entry(SPELLINGS, scales=1, k=lambda k: k * torch.tensor(1.0).div(SCALE), v=lambda v: v * torch.tensor(1.0).div(SCALE))
def times_the_reciprocal(x: Tensor, w: Tensor, pe: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The reciprocal is taken first, which rounds differently."""
    k_nope, v = project(x, w)
    inverse = 1.0 / scale
    k = torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1).float()
    return (k * inverse).to(E4), (v.float() * scale.reciprocal()).to(E4)


@entry(SPELLINGS, k=lambda k: k * 0.3, v=lambda v: v * 4.0)
def python_scales(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in place of tensors."""
    k_nope, v = project(x, w)
    k = torch.cat([k_nope.float(), pe.float().unsqueeze(1).expand(-1, HEADS, -1)], -1)
    return (0.3 * k).to(E4), v.float().mul(4.0).to(E4)


@entry(SPELLINGS, k=lambda k: k * 0.5, v=lambda v: v * 0.25)
def divided_by_numbers(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Quotients by powers of two, in bfloat16."""
    k_nope, v = project(x, w)
    k = torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1)
    return (k / 2).to(E4), torch.div(v, 4.0).to(E4)


@entry(SPELLINGS, scales=1, k=lambda k: k * SCALE, v=lambda v: v * SCALE, loose=True)
def scaled_in_bfloat16(x: Tensor, w: Tensor, pe: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Eager PyTorch rounds the product to bfloat16; the compiled graph does not, and neither does the kernel."""
    k_nope, v = project(x, w)
    k = torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1)
    return (k * scale).to(E4), (scale * v).to(E4)


@entry(SPELLINGS, scales=1, k=lambda k: k * SCALE)
def parts_scaled_apart(x: Tensor, w: Tensor, pe: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Each part is scaled and cast before they meet; the value is not scaled."""
    k_nope, v = project(x, w)
    k = torch.empty(x.shape[0], HEADS, TOTAL, dtype=E4)
    k[..., :NOPE] = (k_nope.float() * scale).to(E4)
    k[..., NOPE:] = (pe.float() * scale).to(E4)[:, None]
    return k, v.to(E4)


@entry(SPELLINGS, scales=1, amplitude=200.0, k=lambda k: k * SCALE, v=lambda v: v * SCALE)
def clamped_to_the_range(x: Tensor, w: Tensor, pe: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The clamp that a saturating cast makes superfluous."""
    k_nope, v = project(x, w)
    limit = torch.finfo(E4).max
    k = torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1).float()
    return (k * scale).clamp(-limit, limit).to(E4), torch.clamp(v.float() * scale, min=-limit, max=limit).to(E4)


@entry(SPELLINGS, amplitude=200.0, k=lambda k: k.clamp(-240.0, 240.0), v=lambda v: v.clamp(-100.0, 300.0))
def clamped_below_the_range(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Clamps that matter."""
    k_nope, v = project(x, w)
    k = torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1)
    return k.clamp(-240.0, 240.0).to(E4), v.clamp_min(-100).clamp_max(300).to(E4)


@entry(SPELLINGS, amplitude=200.0, k=lambda k: k.clamp(-64.0, 64.0) * 2.0, v=lambda v: v * 2.0)
def clamped_before_the_scale(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the steps counts."""
    k_nope, v = project(x, w)
    k = torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1)
    return (torch.clip(k, -64.0, 64.0) * 2.0).to(E4), (v * 2.0).to(E4)


@entry(SPELLINGS, dtype=E5, amplitude=100.0)
def wide_float8(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """e5m2."""
    k_nope, v = project(x, w)
    k = torch.empty(x.shape[0], HEADS, TOTAL, dtype=x.dtype)
    k[..., :NOPE] = k_nope
    k[..., NOPE:] = pe.unsqueeze(1)
    return k.to(E5), v.to(E5)


@entry(SPELLINGS, v_dtype=E5)
def two_kinds_of_float8(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of different types."""
    k_nope, v = project(x, w)
    return torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1).to(E4), v.to(E5)


@entry(SPELLINGS, v=None)
def key_alone(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """No value at all."""
    k_nope, _ = project(x, w)
    return torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1).to(E4)


@entry(SPELLINGS, v=None, scales=1, k=lambda k: k / SCALE, loose=True)
def key_alone_from_an_assignment(x: Tensor, w: Tensor, pe: Tensor, scale: Tensor) -> Tensor:
    """A scaled key by assignment."""
    k_nope, _ = project(x, w)
    k = torch.empty(x.shape[0], HEADS, TOTAL)
    k[..., :NOPE] = k_nope / scale.view(1, 1, 1)
    k[..., NOPE:] = pe.unsqueeze(1) / scale.view(1)
    return k.to(E4)


@entry(SPELLINGS)
def value_before_the_key(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """The value is cast before the key is put together."""
    k_nope, v = project(x, w)
    packed = v.to(E4)
    k = torch.cat([k_nope, pe.unsqueeze(1).expand(-1, HEADS, -1)], -1)
    return k.to(E4), packed


@entry(SPELLINGS)
def windows_of_a_copy(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """The projection is widened as a whole before it is cut."""
    kv = (x @ w).float().view(-1, HEADS, HEAD)
    k = torch.cat([kv[..., :NOPE], pe.float().unsqueeze(1).expand(-1, HEADS, -1)], -1)
    return k.to(E4), kv[..., NOPE:].to(E4)


@entry(SPELLINGS, float_dtype=torch.float16)
def half_precision(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """float16 in place of bfloat16."""
    k_nope, v = project(x, w)
    return torch.concat((k_nope, pe.view(-1, 1, PE).expand(-1, HEADS, PE)), dim=-1).to(E4), v.to(E4)


@entry(SPELLINGS, apart=True)
def strided_view(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """as_strided windows."""
    kv = x @ w
    shape, strides = (x.shape[0], HEADS, NOPE), (HEADS * HEAD, HEAD, 1)
    k_nope, v = kv.as_strided(shape, strides), kv.as_strided(shape, strides, NOPE)
    shared = pe.as_strided((x.shape[0], HEADS, PE), (PE, 0, 1))
    return torch.cat([k_nope, shared], -1).to(E4), v.to(E4)


@entry(SPELLINGS)
def cast_method(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """`type` and a broadcast."""
    k_nope, v = project(x, w)
    shared = torch.broadcast_to(pe[:, None], (x.shape[0], HEADS, PE))
    return torch.cat([k_nope, shared], dim=2).type(E4), v.type(E4)
