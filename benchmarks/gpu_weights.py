"""Random weights of any configuration, made on the device in the very layouts that a checkpoint is read into.

The 26B model needs no file and no host memory: every tensor is filled where it will lie, a packed one in pieces, so
that the peak stays within ``PIECE`` values of the total. Sizes keep activations and logits in the range of a trained
model's (logits of about 3 before the softcap). Router scores are as good as random, so all experts are visited about
equally often: the worst case for bytes, since a trained router leaves some experts out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from convert.recipes import RECIPES, Recipe
from cuda_backend.linear import Dense, Quantized, Weight, fp8_product
from cuda_backend.weights import Reader, Weights, for_fp8, layer_of
from mlx_diffgemma.backend import Remarks
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.formats.checkpoint import EMBEDDING
from mlx_diffgemma.formats.encoding import Encoding, dense
from mlx_diffgemma.tensors import DECODER, VISION, tensor_table

from .gpu_floor import PRECISIONS

PIECE = 2**27  # values made at a time where codes are made of values: 512 MiB in float32
ONE_E4M3 = 0x38
SPREAD_E2M1 = 2.93  # of e2m1's values when all codes are equally likely
SPREAD_INT4 = 4.61
STEPS = 112  # codes of FP8 per standard deviation: four of them reach 448


class Maker(Reader):
    """In place of a checkpoint's reader: tensors of the same names, shapes and layouts, random values."""

    def __init__(
        self, config: ModelConfig, recipe: Recipe, device: torch.device, dtype: torch.dtype, *, fp8: bool, seed: int
    ):
        self.device, self.dtype, self.fp8 = device, dtype, fp8
        self.rows, self.recipe, self.layers = tensor_table(config), recipe, config.text.num_hidden_layers
        self.nbytes = 0
        self.random = torch.Generator(device).manual_seed(seed)

    def weight(self, *names: str) -> Weight:
        rows = [self.rows[name] for name in names]
        shape = (sum(row.shape[0] for row in rows), *rows[0].shape[1:])
        encoding = encoding_of(self.recipe, rows[0], self.layers)
        spread = self._spread(names[0], shape)
        if not encoding.quantized:
            return self._counted(Dense(self._normal(shape, spread)))
        weight = self._counted(Quantized(encoding, shape, packed(encoding, shape, spread, self.random)))
        return for_fp8(weight) if self.fp8 and fp8_product(encoding, shape) else weight

    def values(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Of norms, scales and scalars: between 0.5 and 1.5, a layer's own scalar between 0.7 and 1.1."""
        low, width = (0.7, 0.4) if name.endswith("layer_scalar") else (0.5, 1.0)
        values = torch.rand(self.rows[name].shape, generator=self.random, device=self.device) * width + low
        return self._counted(values.to(dtype or self.dtype))

    def table(self, name: str) -> Tensor:
        shape = self.rows[name].shape
        return self._counted(self._normal(shape, 3 * shape[-1] ** -0.5))

    def _spread(self, name: str, shape: tuple[int, ...]) -> float:
        if name.endswith("router.proj.weight"):
            return 1.0
        calm = 0.03 if "self_conditioning.down_proj" in name else 1.0  # at full strength it amplifies any difference
        return calm * shape[-1] ** -0.5

    def _normal(self, shape: tuple[int, ...], spread: float) -> Tensor:
        empty = torch.empty(shape, dtype=self.dtype, device=self.device)
        return empty.normal_(0, spread, generator=self.random)


def packed(encoding: Encoding, shape: tuple[int, ...], spread: float, random: torch.Generator) -> dict[str, Tensor]:
    """``encoding``'s parts of a weight of ``shape`` whose values have about the standard deviation ``spread``."""
    sizes = {name: size for name, (size, _) in encoding.parts(shape).items()}
    if encoding.mode == "fp8":
        weight = torch.empty(sizes["weight"], dtype=torch.float8_e4m3fn, device=random.device)
        for piece in pieces(weight):
            values = torch.empty(piece.shape, device=random.device).normal_(0, STEPS, generator=random)
            piece.copy_(values.clamp_(-448, 448))
        return {"weight": weight, "scales": around(spread / STEPS, sizes["scales"], random, torch.bfloat16)}
    words = torch.randint(-(2**31), 2**31, sizes["weight"], dtype=torch.int32, device=random.device, generator=random)
    parts = {"weight": words.view(torch.uint32)}
    if encoding.mode == "affine":
        assert encoding.bits == 4, encoding
        scales = around(spread / SPREAD_INT4, sizes["scales"], random, torch.bfloat16)
        return parts | {"scales": scales, "biases": scales * -7.5}
    assert encoding.mode == "nvfp4" and encoding.global_scale, encoding
    scale = ONE_E4M3 + torch.randint(-4, 5, sizes["scales"], device=random.device, generator=random, dtype=torch.int8)
    rows = around(spread / SPREAD_E2M1, sizes["global_scale"], random, torch.float32)
    return parts | {"scales": scale.view(torch.uint8), "global_scale": rows}


def around(middle: float, shape: tuple[int, ...], random: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Positive numbers within a tenth of ``middle``."""
    return (torch.rand(shape, generator=random, device=random.device) * 0.2 + 0.9).mul_(middle).to(dtype)


def pieces(x: Tensor) -> Iterator[Tensor]:
    """Views of ``x`` along its first axis, of at most ``PIECE`` elements where a row allows it."""
    return iter(x.split(max(1, PIECE // max(1, math.prod(x.shape[1:])))))


def encoding_of(recipe: Recipe, row, layers: int) -> Encoding:
    """What a converter would store the row in: what the recipe wants where its shape allows it."""
    wanted = recipe.wanted(row, layers) or dense()
    return wanted if wanted.fits(row.shape) else dense()


def random_weights(
    config: ModelConfig,
    precision: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    *,
    fp8: bool = True,
    seed: int = 0,
) -> Weights:
    """All text weights in ``precision`` (see ``gpu_floor``); ``fp8``: FP8 weights take FP8 activations."""
    recipe, text = RECIPES[PRECISIONS[precision]], config.text
    make = Maker(config, recipe, device, dtype, fp8=fp8, seed=seed)
    conditioning = f"{DECODER}.self_conditioning"
    with torch.no_grad():  # not inference tensors, which torch.compile of the peer would refuse
        return Weights(
            embed_tokens=make.table(EMBEDDING),
            norm=make.norm(f"{DECODER}.norm"),
            pre_norm=make.norm(f"{conditioning}.pre_norm"),
            self_conditioning=make.gated_mlp(conditioning),
            layers=tuple(layer_of(make, i, text.full(i)) for i in range(text.num_hidden_layers)),
            nbytes=make.nbytes,
            remarks=Remarks({}, (), ("random weights",)),
        )


def expected_bytes(config: ModelConfig, precision: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """What those weights take by the tensor table. Norm weights are held in float32."""
    recipe, layers, total = RECIPES[PRECISIONS[precision]], config.text.num_hidden_layers, 0
    for row in tensor_table(config).values():
        if row.role in VISION:
            continue
        encoding = encoding_of(recipe, row, layers)
        if encoding.quantized:
            total += encoding.nbytes(row.shape)
        else:
            total += row.size * (4 if row.role == "norm" else dtype.itemsize)
    return total
