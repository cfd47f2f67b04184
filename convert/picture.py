"""The picture of a quality report: a heat map, layers by modules, in logarithmic colours. Drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from .quality import Group

Colour = tuple[int, int, int]

# Viridis (S. van der Walt, N. Smith, 2015, CC0) at nine points: equal steps look equal, also in grey.
VIRIDIS: tuple[Colour, ...] = (
    (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140),
    (40, 174, 128), (94, 201, 98), (173, 220, 48), (253, 231, 37),
)  # fmt: skip
INK, FAINT, PAPER, ABSENT = (28, 30, 34), (112, 116, 124), (255, 255, 255), (232, 234, 237)
TITLE, TEXT, SMALL = 26, 17, 14  # font sizes in pixels
MARGIN, GAP, ROW, BAR = 36, 12, 52, 22
WIDEST, NARROWEST, MAP_WIDTH = 110, 40, 1200  # of a cell; of the map
DECADES = 6  # most that the colours span


@dataclass(frozen=True)
class HeatMap:
    """What is drawn.

    Args:
        title: the first line large, the others small and grey.
        quantity: what the colours mean, with its unit.
        cells: values by group; groups that are not there were not quantized. A role without layers is one wide cell.
        layers: number of layers.
    """

    title: Sequence[str]
    quantity: str
    cells: Mapping[Group, float]
    layers: int


def draw(chart: HeatMap) -> Image.Image:
    rows = _rows(chart)
    cell = min(max(MAP_WIDTH // chart.layers, NARROWEST), WIDEST)
    left = MARGIN + max([_width(spoken(role), TEXT) for role, _ in rows], default=0) + GAP
    top = MARGIN + TITLE + GAP + (len(chart.title) - 1) * (TEXT + 6) + 2 * GAP
    right, bottom = left + cell * chart.layers, top + ROW * len(rows)
    lines = [_width(line, TEXT if i else TITLE) for i, line in enumerate(chart.title)]
    width = max(right + GAP * 2 + BAR + 90, MARGIN + max(lines)) + MARGIN
    partial = len(chart.cells) < sum(1 if wide else chart.layers for _, wide in rows)
    below = TEXT * 2 + SMALL + GAP + (SMALL + GAP if partial else 0)
    image = Image.new("RGB", (width, bottom + below + MARGIN), PAPER)
    canvas = ImageDraw.Draw(image)
    _title(canvas, chart.title)
    low, high = limits(list(chart.cells.values()))
    for index, (role, wide) in enumerate(rows):
        y = top + index * ROW
        canvas.text((left - GAP, y + ROW / 2), spoken(role), INK, _font(TEXT), anchor="rm")
        for layer in (None,) if wide else range(chart.layers):
            x, size = (left, cell * chart.layers) if layer is None else (left + layer * cell, cell)
            _cell(canvas, (x, y, x + size - 2, y + ROW - 2), chart.cells.get((layer, role)), low, high)
    _layer_axis(canvas, chart.layers, left, bottom, cell)
    _colour_bar(canvas, chart.quantity, (right + GAP * 2, top, bottom), low, high)
    if partial:
        _legend(canvas, left, bottom + TEXT * 2 + GAP * 2)
    return image


def _rows(chart: HeatMap) -> list[tuple[str, bool]]:
    """(role, whether it is outside the layers), those within the layers first."""
    layered = dict.fromkeys(role for layer, role in chart.cells if layer is not None)
    outside = dict.fromkeys(role for layer, role in chart.cells if layer is None)
    return [(role, False) for role in layered] + [(role, True) for role in outside]


def spoken(role: str) -> str:
    return role.replace("_", "-")


def limits(values: Sequence[float]) -> tuple[int, int]:
    """Decades, as powers of ten, that hold all positive values, or the upper ``DECADES`` of them."""
    positive = [value for value in values if 0 < value < math.inf]
    if not positive:
        return -1, 0
    high = math.ceil(math.log10(max(positive)))
    low = max(math.floor(math.log10(min(positive))), high - DECADES)
    return low - (low == high), high


def colour(value: float, low: int, high: int) -> Colour:
    """On a logarithmic scale from 10^low to 10^high; zero and less have the lowest colour."""
    share = (math.log10(value) - low) / (high - low) if value > 0 else 0.0
    return _blend(min(max(share, 0.0), 1.0))


def _blend(share: float) -> Colour:
    at = share * (len(VIRIDIS) - 1)
    index = min(int(at), len(VIRIDIS) - 2)
    a, b = VIRIDIS[index], VIRIDIS[index + 1]
    red, green, blue = (round(x + (y - x) * (at - index)) for x, y in zip(a, b, strict=True))
    return red, green, blue


def short(value: float) -> str:
    """One or two digits, in five characters at most: 0.031, 2e-3."""
    if value == 0:
        return "0"
    if value < 0.01:
        digits, _, power = f"{value:.0e}".partition("e")
        return f"{digits}e{int(power)}"
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _cell(
    canvas: ImageDraw.ImageDraw, box: tuple[float, float, float, float], value: float | None, low: int, high: int
) -> None:
    fill = ABSENT if value is None else colour(value, low, high)
    canvas.rectangle(box, fill)
    if value is None:
        return
    text = short(value)
    if _width(text, SMALL) < box[2] - box[0] - 2:
        bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 120
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        canvas.text(middle, text, INK if bright else PAPER, _font(SMALL), anchor="mm")


def _title(canvas: ImageDraw.ImageDraw, lines: Sequence[str]) -> None:
    y = MARGIN
    for i, line in enumerate(lines):
        canvas.text((MARGIN, y), line, FAINT if i else INK, _font(TEXT if i else TITLE), anchor="la")
        y += TEXT + 6 if i else TITLE + GAP


def _layer_axis(canvas: ImageDraw.ImageDraw, layers: int, left: int, bottom: int, cell: int) -> None:
    for layer in range(layers):
        canvas.text((left + layer * cell + cell / 2, bottom + 6), str(layer), INK, _font(SMALL), anchor="ma")
    canvas.text((left + layers * cell / 2, bottom + SMALL + 16), "layer", INK, _font(TEXT), anchor="ma")


def _colour_bar(canvas: ImageDraw.ImageDraw, quantity: str, at: tuple[int, int, int], low: int, high: int) -> None:
    """From ``top`` to ``bottom``, a tick at every decade; what it means stands beside it, upright."""
    x, top, bottom = at
    height = bottom - top - 2
    for line in range(height):
        canvas.line((x, top + line, x + BAR, top + line), _blend(1 - line / max(height - 1, 1)))
    for power in range(low, high + 1):
        y = top + (height - 1) * (high - power) / (high - low)
        canvas.line((x + BAR, y, x + BAR + 5, y), INK)
        canvas.text((x + BAR + 9, y), tick(power), INK, _font(SMALL), anchor="lm")
    canvas.text((x + BAR + 5, bottom + SMALL + 16), quantity, INK, _font(TEXT), anchor="ma")


def tick(power: int) -> str:
    return f"{10.0**power:g}" if -4 < power < 4 else f"1e{power}"


def _legend(canvas: ImageDraw.ImageDraw, left: int, y: int) -> None:
    canvas.rectangle((left, y, left + SMALL, y + SMALL), ABSENT)
    canvas.text((left + SMALL + 8, y + SMALL / 2), "not quantized", FAINT, _font(SMALL), anchor="lm")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _width(text: str, size: int) -> int:
    return math.ceil(_font(size).getlength(text))
