"""mxfp4, mxfp8 and nvfp4 against ``mx.quantize`` bit for bit, and nvfp4 with a global scale against ModelOpt's rule."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.formats.numbers import bits, chunks, fp8, microscaling
from tests.formats.numbers.arrays import BFLOAT16, DTYPES, ROUNDING, STRUCTURED, cast, from_mlx, normal, to_mlx, weights

PACK = {
    "mxfp4": microscaling.pack_mxfp4,
    "mxfp8": microscaling.pack_mxfp8,
    "nvfp4": microscaling.pack_nvfp4,
}
UNPACK = {
    "mxfp4": microscaling.unpack_mxfp4,
    "mxfp8": microscaling.unpack_mxfp8,
    "nvfp4": microscaling.unpack_nvfp4,
}
GROUP = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
WIDTH = {"mxfp4": 4, "mxfp8": 8, "nvfp4": 4}
# Of amax: below, MLX's e8m0 scale wraps round; above, its float32 cannot tell e2m1 codes apart.
SANE = {"mxfp4": (6 * 2.0**-126, np.inf), "mxfp8": (448 * 2.0**-126, np.inf), "nvfp4": (0, 2.0**32)}


def by_mlx(w: np.ndarray, mode: str, amax: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    scale = None if amax is None else mx.array(amax, mx.float32)
    words, scales = mx.quantize(to_mlx(w), mode=mode, global_scale=scale, stream=mx.cpu)
    return from_mlx(words), from_mlx(scales)


def equal_to_mlx(w: np.ndarray, mode: str) -> bool:
    """Whether codes and scales are MLX's in every group that MLX can represent."""
    ours, theirs = PACK[mode](w), by_mlx(w, mode)
    assert [(a.dtype, a.shape) for a in ours] == [(a.dtype, a.shape) for a in theirs]
    amax = np.abs(w.astype(np.float64)).reshape(-1, GROUP[mode]).max(-1)
    sane = (amax == 0) | ((amax > SANE[mode][0]) & (amax < SANE[mode][1]))
    ours, theirs = ([part.reshape(sane.size, -1)[sane] for part in each] for each in (ours, theirs))
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", PACK)
def test_equal_to_mlx(mode: str, dtype: str):
    assert equal_to_mlx(normal(1, 64, 512, dtype=dtype), mode)
    for name, w in STRUCTURED.items():
        assert equal_to_mlx(cast(w, dtype), mode), name


@given(weights(), st.sampled_from(sorted(PACK)), st.sampled_from(sorted(DTYPES)))
@settings(max_examples=150, deadline=None)
def test_equal_to_mlx_on_anything(w: np.ndarray, mode: str, dtype: str):
    assert equal_to_mlx(cast(w, dtype), mode)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", PACK)
def test_equal_to_mlx_on_every_value_of_two_bytes(mode: str, dtype: str):
    """Each group holds the same largest value, so that the codes of all others are seen."""
    every = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype])
    every = every[np.abs(every.astype(np.float32)) <= 6]
    inner = GROUP[mode] - 1
    w = np.full((-(-every.size // inner // 2) * 2, GROUP[mode]), 6, every.dtype)  # MLX takes no odd number of groups
    w[:, 1:] = np.resize(every, (len(w), inner))
    assert equal_to_mlx(w, mode)


def test_scales_that_wrap_round_in_mlx_are_held():
    w = normal(2, 4, 64, size=1e-40)
    for mode in ("mxfp4", "mxfp8"):
        scales, theirs = PACK[mode](w)[1], by_mlx(w, mode)[1]
        assert (scales == 1).all() and not np.array_equal(scales, theirs)
        assert np.abs(UNPACK[mode](*PACK[mode](w)) - w).max() <= 2.0**-127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.02, 1.0, 300.0])
def test_mlx_global_scale(dtype: str, size: float):
    w = normal(3, 48, 256, dtype=dtype, size=size)
    w[5] = 0
    for amax in (np.abs(w.astype(np.float32)).max(), np.float32(3.7)):
        ours, theirs = microscaling.pack_nvfp4(w, mlx_global_scale=amax), by_mlx(w, "nvfp4", float(amax))
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        back = mx.dequantize(
            *map(to_mlx, theirs), mode="nvfp4", global_scale=mx.array(amax), dtype=mx.float32, stream=mx.cpu
        )
        assert np.array_equal(microscaling.unpack_nvfp4(*ours, amax / np.float32(2688)), from_mlx(back))


@pytest.mark.parametrize("mode", PACK)
def test_unpack_equals_mlx(mode: str):
    words, scales = PACK[mode](normal(4, 3, 16, 128))
    scales = np.random.default_rng(0).integers(0, 127, scales.shape, dtype=np.uint8) + (64 if mode != "nvfp4" else 0)
    theirs = mx.dequantize(to_mlx(words), to_mlx(scales.astype(np.uint8)), mode=mode, dtype=mx.float32, stream=mx.cpu)
    ours = UNPACK[mode](words, scales.astype(np.uint8))
    assert ours.dtype == np.float32 and np.array_equal(ours, from_mlx(theirs))


@pytest.mark.parametrize("mode", PACK)
def test_codes_survive_a_round_trip(mode: str):
    """Every code but the negative zero of e2m1, in groups whose largest value sets the same scale again."""
    rng, group, width = np.random.default_rng(5), GROUP[mode], WIDTH[mode]
    codes = rng.choice([c for c in range(2**width) if c not in ((8,) if width == 4 else (127, 255))], (6, 4 * group))
    codes[:, ::group] = 7 if width == 4 else 126
    scales = rng.integers(1, 127, (6, 4)).astype(np.uint8) + np.uint8(0 if mode == "nvfp4" else 64)
    words = bits.pack(codes, width)
    again = PACK[mode](UNPACK[mode](words, scales))
    assert np.array_equal(again[0], words) and np.array_equal(again[1], scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", PACK)
def test_the_error_is_within_the_bound(mode: str, dtype: str):
    for name in ("normal", "constant", "zero", "one outlier", "sign-symmetric", "quarters", "ramp"):
        w = cast(STRUCTURED[name], dtype)
        if mode == "nvfp4":  # where e4m3 keeps all its bits
            w = np.where(np.abs(w.astype(np.float32)).reshape(4, -1, 16).max(-1) > 6 / 64, 1, 0).repeat(16, -1) * w
            w = w.astype(DTYPES[dtype])
        exact, words, scales = w.astype(np.float64), *PACK[mode](w)
        error = np.abs(UNPACK[mode](words, scales) - exact)
        scale = (fp8.VALUES[scales] if mode == "nvfp4" else np.exp2(scales - 127.0)).repeat(GROUP[mode], -1)
        if mode == "mxfp8":  # the rounding is that of amax / 448, which may put amax a little beyond 448
            bound = np.maximum(np.abs(exact) / 16, scale * 2.0**-10)
        else:
            bound = scale * (1 + 8 * ROUNDING[dtype])
        assert (error <= bound).all(), name


def modelopt(w: np.ndarray, global_scale: float) -> np.ndarray:
    """NVFP4QTensor.quantize and dequantize, written from their formulas -> float32."""
    g = torch.tensor(global_scale, dtype=torch.float32)
    blocks = torch.from_numpy(w.astype(np.float32)).unflatten(-1, (-1, 16))
    scale = blocks.abs().amax(-1) / (6.0 * g)
    scale[scale == 0] = 1.0
    scale = scale.clamp(2**-9, 448).to(torch.float8_e4m3fn).float() * g
    quotient = (blocks / scale.unsqueeze(-1)).double()
    even_first = torch.tensor([0, 1, 2, 4, 0.5, 1.5, 3, 6], dtype=torch.float64)  # argmin takes the first of equals
    nearest = even_first[(quotient.abs().unsqueeze(-1) - even_first).abs().argmin(-1)].float()
    return (nearest * quotient.sign().float() * scale.unsqueeze(-1)).flatten(-2).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_global_scale_gives_modelopts_numbers(dtype: str):
    for name, w in {"random": normal(6, 64, 512), **STRUCTURED}.items():
        w = cast(np.clip(w, -1e30, 1e30), dtype)
        if 0 < np.abs(w.astype(np.float64)).max() < 1e-30:
            continue  # amax / 2688 is subnormal
        scale = microscaling.nvfp4_global_scale(w)
        ours = microscaling.unpack_nvfp4(*microscaling.pack_nvfp4(w, scale), scale)
        assert np.array_equal(ours, modelopt(w, scale)), name


def test_a_global_scale_of_another_tensor_saturates():
    w = normal(7, 4, 64, size=1)
    ours = microscaling.unpack_nvfp4(*microscaling.pack_nvfp4(w, 1e-6), 1e-6)
    assert np.array_equal(ours, modelopt(w, 1e-6)) and np.abs(ours).max() == np.float32(448 * np.float32(1e-6)) * 6


def test_global_scales_by_row_and_by_expert():
    w = normal(8, 3, 6, 64, dtype="bfloat16") * np.arange(1, 4).reshape(3, 1, 1).astype(BFLOAT16)
    experts = np.stack([microscaling.nvfp4_global_scale(expert) for expert in w])
    rows = np.repeat(experts[:, None], 6, 1)
    words, scales = microscaling.pack_nvfp4(w, rows)
    for e in range(3):
        alone = microscaling.pack_nvfp4(w[e], experts[e])
        assert np.array_equal(words[e], alone[0]) and np.array_equal(scales[e], alone[1])
        both = microscaling.unpack_nvfp4(words[e], scales[e], experts[e])
        assert np.array_equal(microscaling.unpack_nvfp4(words, scales, rows)[e], both)
    broadcast = microscaling.pack_nvfp4(w, experts[:, None])
    assert np.array_equal(broadcast[0], words) and np.array_equal(broadcast[1], scales)


def test_the_global_scale_of_a_tensor():
    assert microscaling.nvfp4_global_scale(np.float32([[1, -5.376], [2, 3]])) == np.float32(5.376) / np.float32(2688)
    assert microscaling.nvfp4_global_scale(np.zeros((2, 16), BFLOAT16)) == 1
    assert microscaling.nvfp4_global_scale(normal(9, 4, 64)).dtype == np.float32


def modes() -> dict[str, tuple[Callable, Callable]]:
    scale = np.float32(1e-4)
    return {mode: (PACK[mode], UNPACK[mode]) for mode in PACK} | {
        "nvfp4 with a global scale": (
            lambda w: microscaling.pack_nvfp4(w, scale),
            lambda words, scales: microscaling.unpack_nvfp4(words, scales, scale),
        )
    }


@pytest.mark.parametrize("mode", modes())
def test_experts_strides_and_pieces_do_not_show(mode: str, monkeypatch):
    pack, unpack = modes()[mode]
    w = normal(10, 3, 10, 352, dtype="bfloat16")
    whole, each = pack(w), [pack(expert) for expert in w]
    assert all(np.array_equal(a, np.stack(b)) for a, b in zip(whole, zip(*each, strict=True), strict=True))
    odd, values = pack(w[:, ::2]), unpack(*whole)
    assert all(np.array_equal(a[:, ::2], b) for a, b in zip(whole, odd, strict=True))
    assert np.array_equal(unpack(*(part[:, ::2] for part in whole)), values[:, ::2])
    monkeypatch.setattr(chunks, "CHUNK", 256)
    assert all(np.array_equal(a, b) for a, b in zip(whole, pack(w), strict=True))
    assert np.array_equal(unpack(*whole), values)


def test_the_source_is_left_alone():
    w = normal(11, 4, 128)
    before = w.copy()
    w.flags.writeable = False
    for pack, _ in modes().values():
        pack(w)
    assert np.array_equal(w, before)


@pytest.mark.parametrize("mode", PACK)
def test_what_does_not_fit_is_refused(mode: str):
    with pytest.raises(AssertionError, match="do not divide"):
        PACK[mode](normal(0, 4, GROUP[mode] + 8))
    with pytest.raises(AssertionError, match="int32"):
        PACK[mode](np.zeros((4, 32), np.int32))
    words, scales = PACK[mode](normal(0, 4, 96))
    with pytest.raises(AssertionError, match="do not fit"):
        UNPACK[mode](words, scales[:, :1])
    with pytest.raises(AssertionError, match="either"):
        microscaling.pack_nvfp4(normal(0, 4, 16), 1.0, mlx_global_scale=1.0)
