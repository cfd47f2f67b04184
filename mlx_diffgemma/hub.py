"""From a model name to its place: ``demo``, a folder, a .gguf file, or a hub repository, downloaded once and kept.

``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_TOKEN`` mean what they mean to huggingface_hub. A cut connection is taken up
where it broke; a download that was stopped keeps its finished files. Config and index come first, so that a model that
cannot fit is refused before its weights are fetched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from .config import ModelConfig
from .errors import CheckpointError
from .formats import gguf_model
from .json_file import read_json

DEMO = Path(__file__).parent / "demo_checkpoint"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
WANTED, FOLDERS = ["*.json", "*.jinja", "*.model", "*.safetensors"], ["*/*"]  # a checkpoint is flat


def resolve(name: str, fits: Callable[[ModelConfig, int], None], revision: str | None = None) -> Path:
    """The folder or .gguf file of ``name``. ``fits(config, weight_bytes)`` raises if the model cannot run here.

    Raises:
        FileNotFoundError: no such folder, and not a name the hub knows; the message says which was tried.
    """
    place = DEMO if name == "demo" else _expanded(name)
    files = gguf_model.locate(place) if name else None
    if files:
        config = ModelConfig.from_folder(gguf_model.sidecar_folder(files, None))
        fits(config, gguf_model.resident_bytes(files, config))
        return place
    if name and place.is_dir():
        fits(ModelConfig.from_folder(place), _folder_bytes(place))
        return place
    if place.is_file():
        raise FileNotFoundError(f"{name!r} is a file; give the checkpoint folder it is in, or a .gguf file")
    if not HUB_NAME.fullmatch(name):
        example = "google/diffusiongemma-26B-A4B-it"
        raise FileNotFoundError(f"{name!r} is neither a folder here nor a hub name like {example!r}")
    return _download(name, fits, revision)


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{name!r}: there is no such user; give a folder or a hub name") from error


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())


def _download(name: str, fits: Callable[[ModelConfig, int], None], revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(file: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(name, file, revision=revision))

    def single() -> int:
        """Bytes of a checkpoint in one file, from the cache or from the hub's list of files."""
        cached = huggingface_hub.try_to_load_from_cache(name, SINGLE, revision=revision)
        if isinstance(cached, str):
            return Path(cached).stat().st_size
        return huggingface_hub.hf_hub_download(name, SINGLE, revision=revision, dry_run=True).file_size or 0

    try:
        config = ModelConfig.from_dict(read_json(fetch("config.json")))
        try:
            total = _total(fetch(INDEX))
        except errors.EntryNotFoundError:
            total = single()  # which has no index
        fits(config, total)
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=FOLDERS)
        )
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder here nor a hub name: {_first_line(error)}") from error
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{name}"
        raise FileNotFoundError(f"{name!r} is gated: accept its terms at {page} and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is no folder here and the hub has no such model (or it is private: set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name!r} has no revision {revision!r}; leave it out for the newest") from error
    except errors.LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
        raise FileNotFoundError(
            f"{name!r} is no folder here and not whole in the local cache, and {offline}; download it once online"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} on the hub has no config.json, or no {SINGLE} and no index; it is no checkpoint"
        ) from error
    except (errors.HTTPError, OSError) as error:  # refused, cut off for good, or the disk is full
        raise FileNotFoundError(f"{name!r} could not be downloaded ({_first_line(error)}); try again") from error


def _total(index: Path) -> int:
    metadata = read_json(index).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(total, int | float) or not 0 <= total < 2**63:
        raise CheckpointError(f"{index}: metadata.total_size is {total!r:.80}, expected the bytes of all tensors")
    return int(total)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
