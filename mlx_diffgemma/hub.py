"""From a model name to a folder: ``demo``, a local folder, or a hub repository, downloaded once and kept.

``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_TOKEN`` mean what they mean to huggingface_hub. A download resumes where it
stopped. Config and index come first, so that a model that cannot fit is refused before its weights are fetched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .config import ModelConfig, read_json
from .tensors import stored_bytes

DEMO = Path(__file__).parent / "demo_checkpoint"
SMALL = ("config.json", "generation_config.json")
INDEX = "model.safetensors.index.json"
WANTED = ["*.json", "*.jinja", "*.model", "*.safetensors"]


def resolve(name: str, fits: Callable[[ModelConfig, int], None], revision: str | None = None) -> Path:
    """The folder of ``name``. ``fits(config, weight_bytes)`` raises if the model cannot run here.

    Raises:
        FileNotFoundError: no such folder, and not a name the hub knows; the message says which was tried.
    """
    folder = DEMO if name == "demo" else Path(name).expanduser()
    if folder.is_dir():
        fits(ModelConfig.from_folder(folder), _folder_bytes(folder))
        return folder
    if name == "demo" or name.count("/") != 1 or name.startswith((".", "/", "~")):
        example = "google/diffusiongemma-26B-A4B-it"
        raise FileNotFoundError(f"{name!r} is neither a folder here nor a hub name like {example!r}")
    return _download(name, fits, revision)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _download(name: str, fits: Callable[[ModelConfig, int], None], revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    def fetch(file: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(name, file, revision=revision))

    try:
        config = ModelConfig.from_dict(read_json(fetch(SMALL[0])))
        try:
            total = int(read_json(fetch(INDEX))["metadata"]["total_size"])
        except EntryNotFoundError:
            total = stored_bytes(config)  # a single file has no index
        fits(config, total)
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"the hub has no model {name!r} (or it is private: set HF_TOKEN)") from error
    except LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set and " if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached and "
        raise FileNotFoundError(f"{offline}{name!r} is not in the local cache; download it once online") from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"the hub refused {name!r}: {str(error).splitlines()[0]}") from error
