"""A picture of a GPU result: the time of every part of a step over its floor. Drawn with Pillow, like the heat maps."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

from convert.picture import FAINT, GAP, INK, MARGIN, PAPER, SMALL, TEXT, TITLE, _font, _width

from .gpu_floor import PARTS

BAR, BETWEEN, PANEL = 15, 8, 34  # pixels: of one bar, between parts, above a panel
WIDTH = 640  # of the longest bar
TIME, FLOOR = (59, 82, 139), (94, 201, 98)
Result = dict[str, Any]


def panels(result: Result) -> list[dict[str, Any]]:
    """Our rows whose parts were measured, at batch 1 and the shortest prompt."""
    rows = [row for row in result["rows"] if row["what"] == "ours" and row["parts_ms"] and row["batch"] == 1]
    shortest = min((row["prompt_tokens"] for row in rows), default=0)
    return [row for row in rows if row["prompt_tokens"] == shortest]


def draw(result: Result) -> Image.Image:
    """Raises ValueError where no part was measured."""
    rows = panels(result)
    if not rows:
        raise ValueError("no parts were measured")
    left = MARGIN + max(_width(part, TEXT) for part in PARTS) + GAP
    longest = max(time for row in rows for time in row["parts_ms"].values())
    longest = max(longest, *(max((row["parts_floor_ms"] or {"": 0}).values()) for row in rows))
    height = PANEL + len(PARTS) * (2 * BAR + BETWEEN) + GAP
    top = MARGIN + TITLE + TEXT + 3 * GAP
    image = Image.new("RGB", (left + WIDTH + 150 + MARGIN, top + height * len(rows) + MARGIN), PAPER)
    canvas = ImageDraw.Draw(image)
    canvas.text((MARGIN, MARGIN), f"Milliseconds per part of a denoising step, {result['card']}", INK, _font(TITLE))
    _legend(canvas, MARGIN, MARGIN + TITLE + GAP)
    for index, row in enumerate(rows):
        _panel(canvas, row, left, top + index * height, WIDTH / longest)
    return image


def _legend(canvas: ImageDraw.ImageDraw, x: int, y: int) -> None:
    for colour, text in (
        (TIME, "measured alone, as a CUDA graph"),
        (FLOOR, "floor: bytes over bandwidth, or operations"),
    ):
        canvas.rectangle((x, y + 3, x + BAR, y + 3 + BAR), colour)
        canvas.text((x + BAR + 8, y), text, FAINT, _font(TEXT))
        x += BAR + 8 + _width(text, TEXT) + 3 * GAP


def _panel(canvas: ImageDraw.ImageDraw, row: dict[str, Any], left: int, top: int, scale: float) -> None:
    step, floor = row["ms_per_step"], row["floor_ms"]
    title = f"{row['precision']}, head {row['head']}" + (f": {step:.2f} ms per step" if step else "")
    canvas.text((MARGIN, top), title + (f", floor {floor:.2f}" if floor else ""), INK, _font(TEXT))
    y = top + PANEL
    for part in PARTS:
        canvas.text((left - GAP, y + BAR), part, INK, _font(TEXT), anchor="rm")
        values = (row["parts_ms"].get(part), (row["parts_floor_ms"] or {}).get(part))
        for offset, (value, colour) in enumerate(zip(values, (TIME, FLOOR), strict=True)):
            if value is None:
                continue
            at = y + offset * BAR
            canvas.rectangle((left, at, left + max(value * scale, 1), at + BAR - 2), colour)
            canvas.text((left + value * scale + 6, at + BAR / 2), f"{value:.3f}", FAINT, _font(SMALL), anchor="lm")
        y += 2 * BAR + BETWEEN
