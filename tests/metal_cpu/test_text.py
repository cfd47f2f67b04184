"""The text that is compiled is the text that MLX generates."""

from __future__ import annotations

import re
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.mlx_backend.kernels.launch import Kernel
from tests.metal_cpu import runner
from tests.metal_cpu.metal import call, kernel, run
from tests.metal_cpu.text import FIELDS, generated, read_node
from tests.metal_cpu.translate import ATTRIBUTES, NotMetal, shared_variables, signature, translated

# Everything that MLX writes a signature from: template values of three kinds, few elements, no dimension, shape,
# strides and ndim, attributes, a header.
EXAMPLE = """
import mlx.core as mx
from mlx_diffgemma.mlx_backend.kernels.launch import PRELUDE, Kernel
KERNEL = Kernel(
    "example", ("a", "b", "c"), ("o", "p"),
    "const uint i = thread_position_in_grid.x + thread_index_in_simdgroup * 0;\\n"
    "if (i >= uint(a_shape[0]) || i >= b_ndim + a_strides[0]) return;\\n"
    "o[i] = T(a[i] + T(c)); p[i] = b[0] + K + B;",
    "// a header\\n#define UNUSED 1\\n",
)
INPUTS = [mx.ones((9, 3), mx.bfloat16), mx.ones((2,)), mx.array(2.0)]
ARGUMENTS = {
    "template": [("T", mx.bfloat16), ("K", -3), ("B", True)], "grid": (9, 1, 1), "threadgroup": (4, 1, 1),
    "output_shapes": [(9,), (3, 3)], "output_dtypes": [mx.bfloat16, mx.float32],
}
"""
PRINTED = """
def traced(*inputs):
    header = PRELUDE + KERNEL.header
    made = mx.fast.metal_kernel(KERNEL.name, KERNEL.inputs, KERNEL.outputs, KERNEL.source, header)
    return made(inputs=list(inputs), verbose=True, **ARGUMENTS)
mx.export_function(lambda node: None, traced, *INPUTS)
"""


@pytest.fixture
def example() -> dict:
    names: dict = {}
    exec(EXAMPLE, names)
    return names


def test_it_is_what_mlx_prints(example):
    """In a process of its own, since MLX prints past Python."""
    ran = subprocess.run([sys.executable, "-c", EXAMPLE + PRINTED], capture_output=True, text=True, check=True)
    printed = re.fullmatch(r"Generated source code for `example`:\n```\n(.*)\n```\n", ran.stdout, re.S)
    assert printed and printed[1] == generated(example["KERNEL"], example["INPUTS"], example["ARGUMENTS"]).text


def test_the_compiler_is_given_that_text(example, monkeypatch):
    given: list[str] = []
    compiled = runner.compiled

    def noted(text: str):
        given.append(text)
        return compiled(text)

    monkeypatch.setattr(runner, "compiled", noted)
    o, p = runner.emulate(example["KERNEL"], example["INPUTS"], example["ARGUMENTS"])
    assert given == [generated(example["KERNEL"], example["INPUTS"], example["ARGUMENTS"]).text]
    # a_strides[0] + b_ndim is 4: the threads before it write
    assert np.array(o.astype(mx.float32))[:4].tolist() == [3.0] * 4 and np.array(p).ravel()[:4].tolist() == [-1.0] * 4


def test_few_things_change_on_the_way_to_cpp():
    text = (
        "// a threadgroup reads; 0.1\n"
        "[[kernel]] void f(\n  device float* o [[buffer(0)]],\n  uint3 grid_size [[grid_size]]) {\n"
        "  threadgroup float x[2][4];  /* two\n lines */\n  o[0] = x[0][1] * 0.1 + 1e-3 + 2.f + 0x1p3f + 3.25f + 1.;\n"
        "  const threadgroup float* y = x[0];\n}\n"
    )
    cpp = translated(text)
    assert cpp.count("\n") == text.count("\n") + 3  # two lines before, one behind
    assert "x[0][1] * 0.1f + 1e-3f + 2.f + 0x1p3f + 3.25f + 1.f;" in cpp
    assert "reads" not in cpp and "const threadgroup float* y = x[0];" in cpp
    assert "<float> x_type[2][4];" in cpp and "x_type& x = metal_cpu::threadgroup_variable<x_type>(0, " in cpp
    assert signature(text)[0] == ("o",)


@pytest.mark.parametrize(
    "declaration",
    [
        "threadgroup float a[3], b[3];",
        "threadgroup float a = 0;",
        "threadgroup float a[2] = {1, 2};",
        "threadgroup auto x = y;",
    ],
)
def test_variables_declared_in_other_ways_are_refused(declaration):
    with pytest.raises(NotMetal, match="stands alone"):
        shared_variables(f"void f() {{ {declaration} }}")


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("uint3 amplification_id [[amplification_id]]", "unknown attribute"),
        ("uint grid_size [[grid_size]]", "unknown attribute"),
        ("texture2d<float> x [[texture(0)]]", "unknown argument"),
        ("device float* x [[buffer(1)]]", "out of order"),
    ],
)
def test_arguments_that_nobody_knows_are_refused(parameter, message):
    with pytest.raises(NotMetal, match=message):
        signature(f"[[kernel]] void f(\n  {parameter}) {{\n}}\n")


def test_another_layout_of_the_node_is_refused():
    node = ["n", "text", 8, 1, 1, 4, 1, 1, [(False, False, False)], True, [], False, 0, 0]
    assert [type(field) for field in node] == FIELDS and read_node("x", node).grid == (8, 1, 1)
    for place, value in [
        (9, False),
        (10, [1]),
        (11, True),
        (12, 64),
        (13, 1),
        (8, [(False,) * 4]),
        (2, 8.0),
        (1, None),
    ]:
        with pytest.raises(RuntimeError):
            read_node("x", [*node[:place], value, *node[place + 1 :]])
    with pytest.raises(RuntimeError, match="not those of"):
        read_node("x", [*node, 0])


@pytest.mark.parametrize(("dtype", "number"), [(mx.float32, 1), (mx.float16, 1), (mx.float32, True), (mx.float32, -1)])
def test_one_kernel_has_many_texts(dtype, number):
    """``True`` equals 1, but makes a bool."""
    found = run(
        "o[i] = sizeof(T) * 100 + sizeof(K) * 10 + K;",
        mx.zeros((9,)),
        threads=1,
        template=[("T", dtype), ("K", number)],
    )
    assert found[0] == (400 if dtype == mx.float32 else 200) + (10 if number is True else 40) + number


def test_every_attribute_is_one_of_mlx():
    """MLX passes those of its own list only, so a misspelt name here would stay undeclared there."""
    for name, (kind, _) in ATTRIBUTES.items():
        made = generated(kernel(f"o[i] = {name + ('.x' if kind == 'uint3' else '')};", 0), [], call(4, (4,)))
        assert f"{kind} {name} [[{name}]]" in made.text


def test_a_kernel_may_have_no_template_and_one_input():
    made = generated(Kernel("plain", ("a",), ("o",), "o[0] = a[0];"), [mx.zeros((9,))], call(1, (1,)))
    assert "template" not in made.text and "const device float* a [[buffer(0)]]" in made.text
