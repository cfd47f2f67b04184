"""What a checkpoint folder holds beside weights and config: tokenizer, templates, processor. Copied byte for byte.

They are never rewritten: a processor_config.json that a converter saved again has lost image input elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlx_diffgemma.errors import OptionError

from .digest import sha256
from .output import OutputError, put

NEEDED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
IMAGES = ("processor_config.json",)  # wanted where there is a vision tower
OPTIONAL = (
    "preprocessor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.json",
)
LARGEST = 200_000_000  # bytes; the published tokenizer.json has 32 MB


def find(folder: Path, other: Path | None = None) -> dict[str, Path]:
    """The sidecars by name: those of ``other`` first, then the source's.

    Raises:
        OptionError: ``other`` is no folder or has none.
    """
    if other is not None and not other.is_dir():
        raise OptionError(f"--sidecars-from {str(other)!r} is not a folder")
    found: dict[str, Path] = {}
    for name in (*NEEDED, *IMAGES, *OPTIONAL):
        places = [place / name for place in (other, folder) if place is not None and (place / name).is_file()]
        if places:
            found[name] = places[0]
    if other is not None and not any(path.parent == other for path in found.values()):
        raise OptionError(f"--sidecars-from {str(other)!r} holds none of {', '.join(NEEDED)}")
    return found


def absent(found: Mapping[str, Path], text_only: bool) -> list[str]:
    """What a checkpoint should have and this one has not."""
    return [name for name in (*NEEDED, *(() if text_only else IMAGES)) if name not in found]


def copy(found: Mapping[str, Path], out: Path) -> None:
    """Byte for byte, and looked at again."""
    for name, path in found.items():
        put(out / name, path.read_bytes())
        if sha256(out / name) != sha256(path):
            raise OutputError(f"{out / name} is not what was written to it; check the disk")
