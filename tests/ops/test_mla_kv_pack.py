"""`torch.ops.fusion_passes.mla_kv_pack` and `mla_k_pack` on CPU: the reference, the schema, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusion_passes import arch, tuning
from fusion_passes.lowering import Target
from fusion_passes.ops import _mla_kv_pack_steps as steps_of
from fusion_passes.ops.mla_kv_pack import KEY_OP, OP, cases, mla_kv_pack, parameters_for, plan, reference
from fusion_passes.plans import operand_of
from tests.support.mla_kv_pack import E4, E5, Arguments, draw, expected, same_bytes

SCALE = torch.tensor(2.7)


def call(args: Arguments) -> list[torch.Tensor]:
    return list(OP(*args.positional())) if args.v is not None else [KEY_OP(*args.positional())]


def check(args: Arguments) -> None:
    for actual, wanted in zip(call(args), expected(args), strict=True):
        assert actual.is_contiguous() and same_bytes(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("value", [0, 40])
def test_values(dtype: torch.dtype, layout: str, value: int) -> None:
    form: dict[str, Any] = {"dtype": dtype, "k_layout": layout, "v_layout": layout}
    check(draw(2, 3, 3, 24, 8, value, **form))
    check(draw(2, 3, 3, 24, 8, value, pe_first=True, k_dtype=E5, v_dtype=E5, **form))


@pytest.mark.parametrize("steps", ["*s", "/s", "*1/s", "*0.3", "*s clamp(-20.0,30.0)", "clamp(-1.5,1e9) /s *-4.0"])
def test_steps(steps: str) -> None:
    scale = SCALE if "s" in steps else None
    check(draw(1, 3, 2, 16, 8, 16, k_steps=steps, v_steps="*0.5", k_scale=scale))
    check(draw(1, 3, 2, 16, 8, 16, k_steps="", v_steps=steps, v_scale=scale))


def test_quotients_and_products_with_the_reciprocal_round_differently() -> None:
    # 31 lies half way between two numbers of e4m3fn: the last bit of the quotient decides.
    scales = torch.linspace(1.0, 2.0, 1000)
    halfway = 31.0 * scales
    scale = scales[(halfway / scales == 31.0) & (halfway * (1.0 / scales) < 31.0)][0]
    values = (31.0 * scale).expand(1, 1, 1, 8).contiguous()
    form = ("/s", E4, "bthd", False, "*1/s", E4, "bthd")
    divided, multiplied = OP(values, values[0], values, scale, scale, *form)
    assert divided.float().unique().tolist() == [32.0] and multiplied.float().unique().tolist() == [30.0]


def test_uncast_key() -> None:
    args = draw(1, 3, 2, 16, 8, 0, k_dtype=torch.bfloat16)
    (key,) = call(args)
    assert same_bytes(key, expected(args)[0])


def test_casts_saturate() -> None:
    values = torch.tensor([460.0, 470.0, 1e6, float("inf"), -1e6, float("nan"), 0.0, -0.0]).view(1, 1, 1, 8)
    key, value = OP(values, values[0], values, None, None, "", E4, "bthd", False, "", E5, "bthd")
    assert key[0, 0, 0, :5].float().tolist() == [448, 448, 448, 448, -448]
    assert value[0, 0, 0, :5].float().tolist() == [448, 448, 57344, 57344, -57344]
    assert key.float().isnan().sum() == 2 and value.float().isnan().sum() == 1


def test_reference_computes_in_float64_on_float64() -> None:
    args = draw(1, 3, 2, 16, 8, 16, k_steps="/s *0.3", k_scale=SCALE).positional()
    wide: list[Any] = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    key, value = reference(*wide)
    assert key.dtype == value.dtype == torch.float64
    exact = args[0].double() / SCALE.double() * 0.3
    torch.testing.assert_close(key[..., :16], exact, rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [0, 16])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_opcheck(value: int, tokens: int) -> None:
    args = draw(2, tokens, 2, 16, 8, value, special=False, k_steps="*s", k_scale=SCALE) if tokens else empty(value)
    op = OP if value else KEY_OP
    assert set(torch.library.opcheck(op, args.positional()).values()) == {"SUCCESS"}


def empty(value: int) -> Arguments:
    kv = torch.empty(2, 0, 2, 16 + value).bfloat16()
    return Arguments(kv[..., :16], torch.empty(2, 0, 8).bfloat16(), kv[..., 16:] if value else None)


def test_empty_inputs() -> None:
    key, value = OP(*empty(24).positional())
    assert key.shape == (2, 0, 2, 24) and value.shape == (2, 0, 2, 24)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"k_nope": torch.zeros(2, 3, 4)}, ValueError, r"k_nope must be \[B, T, H, N\].*\[2, 3, 4\]"),
        ({"k_pe": torch.zeros(2, 4, 8).bfloat16()}, ValueError, r"k_pe must be .*with B, T = \[2, 3\].*\[2, 4, 8\]"),
        ({"v": torch.zeros(2, 3, 5, 8).bfloat16()}, ValueError, r"v must be .*\[2, 3, 4\].*\[2, 3, 5, 8\]"),
        ({"k_nope": torch.zeros(2, 3, 4, 16).int()}, TypeError, "k_nope must be bfloat16.*int32"),
        ({"k_pe": torch.zeros(2, 3, 8)}, TypeError, r"k_pe must have the dtype of k_nope \(torch.bfloat16\).*float32"),
        ({"v": torch.zeros(2, 3, 4, 8, device="meta").bfloat16()}, ValueError, "v must be on the device.*meta"),
        ({"k_pe": torch.zeros(2, 3, 12).bfloat16()}, ValueError, "k_pe must have a multiple of 8 columns.*got 12"),
        ({"v": torch.zeros(2, 3, 4, 1032).bfloat16()}, ValueError, "v must have a multiple of 8.*1024, got 1032"),
        ({"k_nope": torch.zeros(2, 3, 16, 4).bfloat16().mT}, ValueError, "k_nope must have neighbouring columns"),
        ({"k_layout": "hbtd"}, ValueError, "k_layout must be one of bthd, bhtd, got 'hbtd'"),
        ({"k_dtype": torch.float16}, TypeError, "k_dtype must be torch.float8_e4m3fn or.*without steps.*float16"),
        ({"v_dtype": torch.bfloat16}, TypeError, "v_dtype must be torch.float8_e4m3fn or torch.float8_e5m2, got"),
        ({"k_steps": "*s"}, ValueError, r"k_scale must be a tensor.*k_steps '\*s' use, got None"),
        ({"v_scale": SCALE}, ValueError, r"v_scale must be None, as v_steps '' use no scale, got shape"),
        ({"k_scale": torch.ones(2), "k_steps": "/s"}, ValueError, r"k_scale must have one element, got shape \[2\]"),
        ({"k_scale": torch.ones(1).int(), "k_steps": "/s"}, TypeError, "k_scale must be bfloat16.*int32"),
        ({"k_steps": "+1"}, ValueError, r"k_steps cannot be read: a step must be one of.*got '\+1'"),
        ({"k_steps": "*0.5 *2.0"}, ValueError, r"each kind of step .* may occur once, got '\*0.5 \*2.0'"),
        ({"k_steps": "*s /s", "k_scale": SCALE}, ValueError, "each kind of step"),
        ({"k_steps": "clamp(2.0,1.0)"}, ValueError, "low <= high"),
        ({"v_steps": "clamp(2.0,1.0)"}, ValueError, "v_steps cannot be read.*low <= high"),
        ({"v_layout": "hbtd"}, ValueError, "v_layout must be one of bthd, bhtd, got 'hbtd'"),
        ({"k_scale": SCALE.to("meta"), "k_steps": "*s"}, ValueError, r"k_scale must be on the device of k_nope.*meta"),
        ({"k_steps": "*1e39"}, ValueError, "factor must be a float32 number, got 1e\\+39"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    args = draw(2, 3, 4, 16, 8, 16).__dict__
    with pytest.raises(error, match=words):
        OP(*Arguments(**{**args, **changes}).positional())


def test_steps_are_read_back_as_written() -> None:
    for text in ("", "*s", "/s *0.25", "*1/s clamp(-240.0,240.0)", "clamp(-1.0,1.0) *-1e-05 *s"):
        assert str(steps_of.parse(text)) == text


def test_fake_tensors_of_cuda_need_no_values() -> None:
    with FakeTensorMode():
        shapes = ((1, 5, 4, 128), (1, 5, 64), (1, 5, 4, 128))
        nope, pe, v = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        key, value = OP(*Arguments(nope, pe, v, v_layout="bhtd").positional())
    assert key.shape == (1, 5, 4, 192) and value.shape == (1, 4, 5, 128) and key.dtype == E4


def test_backward_says_that_there_is_none() -> None:
    args = draw(1, 3, 2, 16, 8, 0, dtype=torch.float32, k_dtype=torch.float32)
    args.k_nope.requires_grad_()
    with pytest.raises(NotImplementedError, match="mla_k_pack has no gradient"):
        KEY_OP(*args.positional()).sum().backward()


@pytest.mark.parametrize("head_first", [False, True])
def test_public_function(head_first: bool) -> None:
    args = draw(2, 3, 4, 16, 8, 16, k_steps="*s", k_scale=SCALE)
    form: dict[str, Any] = {"k_steps": "*s", "k_scale": SCALE, "head_first": head_first}
    key, value = mla_kv_pack(args.k_nope, args.k_pe[:, :, None], args.v, **form)
    wanted = [t.transpose(1, 2) if head_first else t for t in expected(args)]
    assert value is not None and same_bytes(key, wanted[0].contiguous()) and same_bytes(value, wanted[1].contiguous())
    single, nothing = mla_kv_pack(args.k_nope[0], args.k_pe[0], **form)
    assert nothing is None and same_bytes(single, wanted[0][0].contiguous())
    with pytest.raises(ValueError, match=r"k_nope must be \[T, H, N\] or \[B, T, H, N\]"):
        mla_kv_pack(args.k_nope[0, 0], args.k_pe[0])


@pytest.mark.parametrize("name", sorted(arch.TABLE))
@pytest.mark.parametrize("heads, columns", [(1, 24), (3, 320), (128, 320), (64, 512), (16, 3072), (5, 72)])
def test_tuned_parameters_fit_every_shape(name: str, heads: int, columns: int) -> None:
    on = arch.by_name(name)
    for pairs in (1, 2048, 2049, 1 << 20, 1 << 33):
        use = parameters_for(on, pairs, heads, columns)
        assert use["rows"] * columns <= 128 * use["warps"] * on.warp_size
        assert use["flat"] or use["rows"] < 2 * heads


def test_forced_launch_parameters_that_cannot_run() -> None:
    on = arch.by_name("sm_90")
    with tuning.overriding(mla_kv_pack="rows=64,warps=1"), pytest.raises(ValueError, match="would hold 640 values"):
        parameters_for(on, 1 << 20, 128, 320)
    with tuning.overriding(mla_kv_pack="warps=64"), pytest.raises(ValueError, match="2048 threads"):
        parameters_for(on, 1 << 20, 128, 320)


def test_the_grid_follows_the_size() -> None:
    def grid(tokens: int) -> tuple[int, ...]:
        kv = torch.empty(1, tokens, 16, 256, device="meta", dtype=torch.bfloat16)
        pe = torch.empty(1, tokens, 64, device="meta", dtype=torch.bfloat16)
        args = Arguments(kv[..., :128], pe, kv[..., 128:]).positional()
        return plan(Target(arch.by_name("sm_90"), int), *map(operand_of, args)).grid

    assert len(grid(1)) == 2 and len(grid(1 << 20)) == 1
    assert grid(7)[0] == 7


def test_dependent_launch_is_for_gpus_that_have_it_and_can_be_switched_off() -> None:
    args = tuple(map(operand_of, draw(1, 3, 4).positional()))
    for name, forced, wanted in (("sm_90", {}, True), ("sm_90", {"pdl": 0}, False), ("sm_89", {}, False)):
        with tuning.overriding(**({"mla_kv_pack": forced} if forced else {})):
            assert plan(Target(arch.by_name(name), int), *args).pdl == wanted


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_gpus_without_saturating_casts(name: str) -> None:
    args = draw(1, 3, 4)
    with pytest.raises(NotImplementedError, match=f"{name}.*no saturating conversion.*from sm_89 on"):
        plan(Target(arch.by_name(name), int), *map(operand_of, args.positional()))


def test_benchmark_cases_are_consistent() -> None:
    generator = torch.Generator().manual_seed(0)
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    for case in [c for c in cases() if c.bytes <= 2 << 20]:
        args = case.make(torch.device("cpu"), generator)
        results = case.op(*args)
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.dim() > 1]
        # k_nope and v are windows of one tensor, each read once; k_pe is read once.
        assert case.bytes == sum(t.numel() * t.element_size() for t in (*tensors, *results))
        assert case.plain is not None
        for ours, theirs in zip(results, case.plain(*args)):
            assert same_bytes(ours, theirs.reshape(ours.shape))
