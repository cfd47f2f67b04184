"""To the hub: exactly the files of a manifest that verifies, with a model card, in one commit."""

from __future__ import annotations

from pathlib import Path

from mlx_diffgemma.errors import CheckpointError, OptionError
from mlx_diffgemma.hub import HUB_NAME
from mlx_diffgemma.json_file import read_json

from .card import card
from .manifest import MANIFEST, verify
from .output import OutputError

CARD = "README.md"


def check_name(repo: str) -> None:
    """Before hours are spent on a conversion."""
    if not HUB_NAME.fullmatch(repo):
        raise OptionError(f"--upload {repo!r} is not a repository such as 'name/diffusiongemma-26B-A4B-it-4bit'")


def upload(folder: Path, repo: str) -> str:
    """The address of the commit. A repository that is there gets a new commit, one that is not is made.

    Raises:
        FileNotFoundError: the folder was not written by a conversion.
        CheckpointError: its files are not those that were written.
        OutputError: the hub refused.
    """
    import huggingface_hub
    from huggingface_hub import errors

    check_name(repo)
    faults = verify(folder)
    if faults:
        raise CheckpointError(f"{folder} does not verify: {'; '.join(faults[:3])}; nothing was uploaded")
    manifest = read_json(folder / MANIFEST)
    add = huggingface_hub.CommitOperationAdd
    files = [add(name, str(folder / name)) for name in (*manifest["outputs"], MANIFEST)]
    files.append(add(CARD, card(manifest, repo).encode()))
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        done = api.create_commit(repo, files, commit_message=f"Converted by {manifest['library']}")
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise OutputError(f"{repo!r} could not be uploaded ({first}); --upload again takes up what arrived") from error
    return str(done.commit_url)
