"""Recipes: which number format each tensor gets, by its role in the tensor table and never by a part of its name.

A recipe is one of ``RECIPES`` or a TOML file::

    [roles]
    experts = "affine 4 g64"            # a role of the tensor table -> an encoding, or "keep"
    attention = "affine 8 g64"
    default = "bf16"                    # of the roles that are not named; this is the default

    [[override]]                        # later ones win
    layers = [0, 1, -1]                 # of the text model; negative ones count from the end; all by default
    roles = ["experts"]                 # all by default
    modules = ["experts.down_proj"]     # the end of the tensor's path, in whole parts; all by default
    encoding = "affine 6 g64"
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mlx_diffgemma.errors import OptionError
from mlx_diffgemma.formats.assemble import module_name
from mlx_diffgemma.formats.encoding import Encoding, dense, grouped
from mlx_diffgemma.formats.mlx import BITS, SIZES
from mlx_diffgemma.tensors import DECODER, ENCODER, Role, Tensor

from .options import expanded

ROLES: tuple[Role, ...] = get_args(Role)
LAYER = re.compile(rf"(?:{re.escape(DECODER)}|{re.escape(ENCODER)})\.layers\.(\d+)\.")
DENSE = {"bf16": "bfloat16", "f16": "float16", "fp16": "float16", "f32": "float32", "fp32": "float32"}
EXAMPLES = "bf16, affine 4 g64, mxfp4, mxfp8, nvfp4, nvfp4 global, fp8, fp8 block 128, keep"


@dataclass(frozen=True)
class Override:
    """An exception. ``encoding`` is None to keep what is stored; an empty selection means everything."""

    encoding: Encoding | None
    layers: tuple[int, ...] = ()
    roles: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    def meets(self, row: Tensor, layers: int) -> bool:
        chosen = {layer % layers for layer in self.layers}
        return (
            (not chosen or layer_of(row) in chosen)
            and (not self.roles or row.role in self.roles)
            and (not self.modules or any(ends_in(row, module) for module in self.modules))
        )


@dataclass(frozen=True)
class Recipe:
    """``roles`` has every role; None keeps the numbers as they are stored."""

    name: str
    roles: Mapping[str, Encoding | None]
    overrides: tuple[Override, ...] = ()

    def wanted(self, row: Tensor, layers: int) -> Encoding | None:
        """What the recipe asks for, whether or not the tensor can be stored so."""
        for override in reversed(self.overrides):
            if override.meets(row, layers):
                return override.encoding
        return self.roles[row.role]

    def resolved(self) -> dict[str, Any]:
        """The recipe in words, for manifests and fingerprints."""
        return {
            "name": self.name,
            "roles": {role: words(encoding) for role, encoding in self.roles.items()},
            "overrides": [
                {"encoding": words(o.encoding)}
                | {key: list(getattr(o, key)) for key in ("layers", "roles", "modules") if getattr(o, key)}
                for o in self.overrides
            ],
        }


def words(encoding: Encoding | None) -> str:
    return "keep" if encoding is None else str(encoding)


def layer_of(row: Tensor) -> int | None:
    """The layer of the text model that a row belongs to."""
    match = LAYER.match(row.name)
    return int(match[1]) if match else None


def ends_in(row: Tensor, module: str) -> bool:
    """Whether the path of ``row`` ends in the parts of ``module``: ``down_proj`` is not the end of ``up_down_proj``."""
    return f".{module_name(row.name)}".endswith(f".{module_name(module)}")


def _recipe(name: str, default: Encoding | None = dense(), **roles: Encoding | None) -> Recipe:  # noqa: B008
    return Recipe(name, {role: roles.get(role, default) for role in ROLES})


EIGHT = grouped("affine", bits=8, group_size=64)
Q8_0 = grouped("affine", bits=8, group_size=32)  # what GGUF calls so
FP8 = Encoding("fp8")
REST_AT_8: dict[str, Encoding | None] = {
    role: EIGHT for role in ("embedding", "attention", "mlp", "router", "self_conditioning")
}
KEEP = _recipe("keep", None)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        _recipe("bf16"),
        _recipe("w8", experts=EIGHT, **REST_AT_8),
        _recipe("experts4", experts=grouped("affine", bits=4, group_size=64), **REST_AT_8),
        _recipe("mxfp4", experts=grouped("mxfp4"), **REST_AT_8),
        _recipe("mxfp8", experts=grouped("mxfp8"), **REST_AT_8),
        _recipe("nvfp4", experts=grouped("nvfp4"), **REST_AT_8),
        _recipe("q8_0", **dict.fromkeys(("embedding", "attention", "mlp", "experts", "self_conditioning"), Q8_0)),
        _recipe("fp8", experts=FP8, attention=FP8, mlp=FP8),
        _recipe(
            "experts4-fp8",
            experts=Encoding("nvfp4", "bfloat16", 4, 16, global_scale=True),
            attention=FP8,
            mlp=FP8,
        ),
    )
}


def recipe(text: str | None) -> Recipe:
    """A recipe by name or file; None keeps everything.

    Raises:
        FileNotFoundError, OptionError: no such recipe, or a file that does not describe one.
    """
    if text is None or text == KEEP.name:
        return KEEP
    if text in RECIPES:
        return RECIPES[text]
    file = expanded(text)
    if file.suffix != ".toml":
        raise OptionError(f"unknown recipe {text!r}; known are {', '.join(RECIPES)}, or give a .toml file")
    if not file.is_file():
        raise FileNotFoundError(f"{text!r} does not exist; known recipes are {', '.join(RECIPES)}")
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        raise OptionError(f"{file} is not valid TOML ({error})") from error
    return _from_toml(file, data)


def parse_encoding(text: str) -> Encoding | None:
    """``affine 4 g64`` and the like; None for ``keep``.

    Raises:
        OptionError: not an encoding.
    """
    plain = " ".join(text.lower().replace("-bit", "").split())
    if plain == "keep":
        return None
    if plain in DENSE or plain in DENSE.values():
        return dense(DENSE.get(plain, plain))
    if match := re.fullmatch(r"affine (\d)(?: g(\d+))?", plain):
        bits, group = int(match[1]), int(match[2] or 64)
        if bits in BITS and group in SIZES:
            return grouped("affine", bits=bits, group_size=group)
        raise OptionError(f"{text!r}: affine has {_either(BITS)} bits in groups of {_either(SIZES)}")
    if plain in ("mxfp4", "mxfp8", "nvfp4"):
        return grouped(plain)  # type: ignore[arg-type]
    if plain in ("nvfp4 global", "nvfp4 with global scale"):
        return Encoding("nvfp4", "bfloat16", 4, 16, global_scale=True)
    if plain in ("fp8", "fp8 per channel"):
        return FP8
    if match := re.fullmatch(r"fp8 block (\d+)", plain):
        return Encoding("fp8", "float32", block=int(match[1]) or 128)
    raise OptionError(f"{text!r} is not an encoding; give one such as {EXAMPLES}")


def _either(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"


def _from_toml(path: Path, data: Mapping[str, Any]) -> Recipe:
    _known(path, "", data, ("name", "roles", "override"))
    roles = data.get("roles", {})
    if not isinstance(roles, Mapping):
        raise OptionError(f"{path}: roles is {roles!r:.80}, expected a table of roles and encodings")
    _known(path, "roles.", roles, (*ROLES, "default"))
    given = {role: _encoding(path, f"roles.{role}", text) for role, text in roles.items()}
    default = given.pop("default", dense())
    overrides = data.get("override", [])
    if not isinstance(overrides, list) or not all(isinstance(row, Mapping) for row in overrides):
        raise OptionError(f"{path}: override is {overrides!r:.80}, expected [[override]] tables")
    found = tuple(_override(path, f"override {i + 1}", row) for i, row in enumerate(overrides))
    return Recipe(str(data.get("name", path.stem)), {role: given.get(role, default) for role in ROLES}, found)


def _override(path: Path, where: str, row: Mapping[str, Any]) -> Override:
    _known(path, f"{where}: ", row, ("layers", "roles", "modules", "encoding"))
    kinds = {"layers": int, "roles": str, "modules": str}
    for key, kind in kinds.items():
        values = row.get(key, [])
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            what = "layer numbers" if kind is int else "names"
            raise OptionError(f"{path}: {where}: {key} is {values!r:.80}, expected a list of {what}")
    for role in row.get("roles", []):
        _known(path, f"{where}: role ", {role: None}, ROLES)
    chosen = {key: tuple(row.get(key, ())) for key in kinds}
    return Override(_encoding(path, f"{where}: encoding", row.get("encoding")), **chosen)


def _encoding(path: Path, where: str, text: Any) -> Encoding | None:
    if not isinstance(text, str):
        raise OptionError(f"{path}: {where} is {text!r:.80}, expected an encoding such as {EXAMPLES}")
    try:
        return parse_encoding(text)
    except OptionError as error:
        raise OptionError(f"{path}: {where}: {error}") from error


def _known(path: Path, where: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            raise OptionError(f"{path}: unknown {where}{key}; known are {', '.join(known)}")
