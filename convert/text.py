"""Tables and sizes for people."""

from __future__ import annotations

from collections.abc import Sequence

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def readable(size: float) -> str:
    """``4.21 GB``; three digits, so that columns line up."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 99.95 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def parse_size(text: str) -> int | None:
    """Bytes of ``5GB``, ``500 MB`` or a plain number; None for anything else."""
    plain = text.strip().lower()
    digits = plain.rstrip("abcdefghijklmnopqrstuvwxyz ")
    try:
        return int(float(digits) * UNITS[plain[len(digits) :].strip()])
    except (ValueError, KeyError, OverflowError):
        return None


def clock(seconds: float) -> str:
    """``0:07``, ``12:30``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(rows: Sequence[Sequence[object]], sides: str = "") -> list[str]:
    """Columns as wide as they must be, each flush left or right as its letter in ``sides`` says: ``<>``."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    forms = [f"{{:{side}{width}}}" for side, width in zip(sides.ljust(len(widths), "<"), widths, strict=False)]
    return ["  ".join(form.format(cell) for form, cell in zip(forms, row, strict=True)).rstrip() for row in texts]
