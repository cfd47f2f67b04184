"""The model card of a converted checkpoint: README.md for the hub, from the manifest alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_diffgemma.hub import HUB_NAME

from .text import readable

PAGE = "https://huggingface.co"


def card(manifest: Mapping[str, Any], repo: str) -> str:
    """Markdown with the front matter that the hub reads."""
    return "\n".join([*_front(manifest), "", *_body(manifest, repo)]) + "\n"


def base_model(manifest: Mapping[str, Any]) -> str | None:
    """The repository at the beginning of the chain of conversions, where it is known."""
    source = manifest["source"]
    named = [name for name in (source["name"], *source.get("made_from", [])) if HUB_NAME.fullmatch(name)]
    return named[-1] if named else None


def _front(manifest: Mapping[str, Any]) -> Iterator[str]:
    mlx = manifest["target"] == "mlx"
    yield "---"
    if base := base_model(manifest):
        yield f"base_model: {base}"
        if any(row["edge"] in ("quantize", "requantize") for row in manifest["tensors"].values()):
            yield "base_model_relation: quantized"
    yield f"library_name: {'mlx' if mlx else 'mlx-diffgemma'}"
    yield "pipeline_tag: text-generation"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("diffusion_gemma", "text-diffusion", *(["mlx"] if mlx else [])))
    yield "---"


def _body(manifest: Mapping[str, Any], repo: str) -> Iterator[str]:
    base = base_model(manifest)
    origin = f"[{base}]({PAGE}/{base})" if base else f"`{manifest['source']['name']}`"
    yield f"# {repo.partition('/')[2]}"
    yield ""
    yield (
        f"DiffusionGemma, converted by {manifest['library']} from {origin} ({manifest['source']['format']}) "
        f"with the recipe `{manifest['recipe']['name']}`."
    )
    yield ""
    yield "```sh"
    yield f'mlx_diffgemma.generate --model {repo} --prompt "Why is the sky blue?"'
    yield "```"
    yield ""
    yield f"- {readable(manifest['bytes'])}, {manifest['parameters']:,} weights"
    yield f"- {manifest['bits_per_weight']:.2f} bits per weight"
    if manifest["text_only"]:
        yield "- text only: the vision tower is left out"
    yield ""
    yield from _formats(manifest)
    yield ""
    yield (
        "The error is the root mean square of what rounding changed, relative to the weights, in the worst tensor. "
        "`conversion_manifest.json` has it for every tensor, and the SHA-256 of every file; "
        "`mlx_diffgemma.convert DIR --show --verify` checks them."
    )
    yield ""
    yield "## Licence"
    yield ""
    where = f" See [its page]({PAGE}/{base})." if base else ""
    yield f"The weights are under the licence of the model they were converted from.{where}"


def _formats(manifest: Mapping[str, Any]) -> Iterator[str]:
    """One row for every pair of formats, with how many tensors took it and what it cost."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in manifest["tensors"].values():
        groups.setdefault((row["role"], row["from"], row["to"]), []).append(row.get("error", 0.0))
    yield "| role | from | to | tensors | error |"
    yield "|---|---|---|---:|---:|"
    for (role, source, target), errors in groups.items():
        worst = max(errors)
        yield f"| {role} | {source} | {target} | {len(errors):,} | {f'{worst:.2%}' if worst else ''} |"
