"""Every launch of a step of the 26B model, listed and not run, within what each Apple GPU takes."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from importlib import resources
from math import prod

import mlx.core as mx
import pytest

from mlx_diffgemma.backend import CanvasSpec
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.mlx_backend.cache import empty_cache
from mlx_diffgemma.mlx_backend.economy import Saving
from mlx_diffgemma.mlx_backend.kernels.launch import PRELUDE, running_on
from mlx_diffgemma.mlx_backend.kernels.ops import FUSED, KERNELS
from mlx_diffgemma.mlx_backend.linear import Dense
from mlx_diffgemma.mlx_backend.network import Network
from mlx_diffgemma.mlx_backend.step import denoise, tables
from mlx_diffgemma.mlx_backend.trial import one_of_each, only
from mlx_diffgemma.tensors import VISION, tensor_table
from tests.metal_cpu.text import generated

THREADS = 512  # of a threadgroup: pipelines with many registers refuse more, on some chips
BUFFERS = 31  # Metal feature set tables


@functools.cache
def launches(dtype: mx.Dtype, rows: int) -> list[tuple]:
    """(kernel, inputs, arguments) of a step of two layers, one of each kind: weights are zeros that nobody makes."""
    text = resources.files("mlx_diffgemma").joinpath("fixtures/diffusiongemma-26B-A4B-it.json").read_text()
    config = ModelConfig.from_dict(json.loads(text))
    config = dataclasses.replace(config, text=only(config.text, one_of_each(config.text)))
    matrices, arrays = {}, {}
    for row in tensor_table(config).values():
        if row.role in VISION:
            continue
        if len(row.shape) > 1:
            matrices[row.name] = Dense(mx.zeros(row.shape, dtype))
        else:
            wide = row.role == "norm" or row.name.endswith("per_expert_scale")
            arrays[row.name] = mx.zeros(row.shape, mx.float32 if wide else dtype)
    network, found = Network(config.text, matrices, arrays, dtype, FUSED), []

    def note(kernel, inputs, arguments):
        found.append((kernel, inputs, arguments))
        shapes = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
        return [mx.zeros(shape, kind) for shape, kind in shapes]

    with running_on(note):
        cache = empty_cache(config.text, rows, dtype)
        specs = [CanvasSpec(GenerationConfig(), seed=1)] * rows
        settings, schedule, carried = tables(specs, 2, config.canvas_length, config.text.vocab_size)
        prefix = network.prefix(cache, config.canvas_length)
        for dense in (None, 0.25):
            denoise(network, settings, prefix, carried, schedule.at(0), Saving(dense=dense))
        soft = mx.zeros((rows, config.canvas_length, config.text.hidden_size), dtype)
        denoise(network, settings, prefix, dataclasses.replace(carried, soft=soft), schedule.at(1), Saving())
    return found


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_a_launch_fits_every_gpu(dtype, rows):
    names = {kernel.name for kernel, _, _ in launches(dtype, rows)}
    assert len(names) >= len(KERNELS)
    for kernel, _, arguments in launches(dtype, rows):
        group, grid = arguments["threadgroup"], arguments["grid"]
        assert 1 <= prod(group) <= THREADS, (kernel.name, group)
        assert prod(grid) >= prod(group) and max(grid) < 2**31, (kernel.name, grid)


def test_a_text_fits_every_compiler():
    """Buffers are few enough; a loop over an array of a thread says that it is unrolled; nothing in it is double."""
    seen = set()
    for kernel, inputs, arguments in launches(mx.bfloat16, 1):
        if kernel.name in seen:
            continue
        seen.add(kernel.name)
        text = generated(kernel, inputs, arguments).text
        assert PRELUDE in text
        numbers = [int(n) for n in re.findall(r"\[\[buffer\((\d+)\)\]\]", text)]
        assert max(numbers) < BUFFERS and "double" not in text, kernel.name
