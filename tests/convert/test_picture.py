"""The heat map: its size, its colours, and that everything is where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert import picture
from convert.picture import ABSENT, HeatMap, colour, draw, limits, short, tick

ROLES = ("attention", "mlp", "router", "experts")


def chart(layers: int = 6, leave_out: tuple = ()) -> HeatMap:
    cells = {(layer, role): 10.0 ** (-1 - (layer + i) % 5) for i, role in enumerate(ROLES) for layer in range(layers)}
    cells |= {(None, "embedding"): 1e-3}
    return HeatMap(
        ("Title", "what", "figures"), "KL, nats", {k: v for k, v in cells.items() if k not in leave_out}, layers
    )


@pytest.mark.parametrize("layers", [1, 6, 30])
def test_it_is_saved_opens_and_is_not_blank(layers: int, tmp_path: Path):
    drawn = chart(layers)
    draw(drawn).save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG" and image.mode == "RGB"
        pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    cell = min(max(picture.MAP_WIDTH // layers, picture.NARROWEST), picture.WIDEST)
    assert width > cell * layers and 5 * picture.ROW < height < 5 * picture.ROW + 300
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert (edge == 255).all(), "the margin is white"
    found = {tuple(row) for row in pixels.reshape(-1, 3)[::7].tolist()}
    assert all(colour(value, *limits(list(drawn.cells.values()))) in found for value in drawn.cells.values()), (
        "every value has its colour"
    )


def test_what_was_not_quantized_is_grey_and_said_to_be(tmp_path: Path):
    whole, partial = (np.asarray(draw(chart(leave_out=out))) for out in ((), ((2, "router"),)))
    grey = lambda pixels: int((pixels == ABSENT).all(-1).sum())  # noqa: E731
    assert grey(whole) == 0
    assert grey(partial) >= (picture.WIDEST - 2) * (picture.ROW - 2)
    assert partial.shape[0] > whole.shape[0], "the legend has a line of its own"


def test_colours_are_logarithmic_and_span_six_decades_at_most():
    assert limits([2e-3, 0.4]) == (-3, 0)
    assert limits([1e-12, 1e-2]) == (-8, -2)
    assert limits([0.01]) == (-3, -2) and limits([0.0]) == (-1, 0) == limits([])
    assert colour(1e-3, -3, 0) == picture.VIRIDIS[0] and colour(1.0, -3, 0) == picture.VIRIDIS[-1]
    assert colour(0.0, -3, 0) == colour(1e-9, -3, 0) == picture.VIRIDIS[0]
    assert colour(10**-1.5, -3, 0) == picture.VIRIDIS[4], "half way in the exponent is half way in colour"


def test_numbers_fit_into_a_narrow_cell():
    values = (0, 3.4e-12, 0.00042, 0.0042, 0.031, 0.5, 7.25, 64.0, 512.0)
    assert [short(value) for value in values] == "0 3e-12 4e-4 4e-3 0.031 0.5 7.2 64 512".split()
    assert [tick(power) for power in (-5, -3, 0, 2)] == ["1e-5", "0.001", "1", "100"]
