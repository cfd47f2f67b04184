"""JSON files of a checkpoint folder: config, index, tokenizer settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file; a broken or missing file is reported by name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder needs it")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, a number of 5,000 digits
        raise ConfigError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a JSON {type(data).__name__}, not an object; download it again")
    return data
