"""The wheel, as a stranger gets it: ``python tests/packaging/wheel.py`` builds it, installs it alone, and uses it.

The commands run in a folder with a ``convert.py`` that must never be imported. Called by ``.ci/run``, not by pytest:
it makes an environment of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"mlx_diffgemma", "cuda_backend", "convert"}
FILES = {
    "cuda_backend/kernels/proven.json",
    "mlx_diffgemma/mlx_backend/kernels/proven.json",
    "mlx_diffgemma/py.typed",
    "mlx_diffgemma/fixtures/diffusiongemma-26B-A4B-it.json",
    "mlx_diffgemma/demo_checkpoint/config.json",
    "mlx_diffgemma/demo_checkpoint/model.safetensors",
}
ABSENT = ("torch", "transformers") if sys.platform == "darwin" else ("mlx", "torch", "transformers")
HOSTILE = "raise SystemExit('the file convert.py of the working folder was imported')\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        check_contents(wheel)
        python = install(wheel, folder)
        check_environment(python, folder)
        check_commands(python.parent, folder)
    print("wheel: contents, clean installation and commands are as they should be")


def build(folder: Path) -> Path:
    """From a copy, so that nothing stale in ``build/`` gets in."""
    skipped = shutil.ignore_patterns(".*", "build", "dist", "shared", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder / "source", ignore=skipped)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, folder / "source")
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    info = {top for top in tops if top.endswith(".dist-info")}
    expect(tops - info == NAMES, f"the wheel holds {sorted(tops)} at top level")
    missing = (FILES | {f"{top}/licenses/LICENSE" for top in info}) - names
    expect(not missing, f"the wheel lacks {sorted(missing)}")
    print(f"wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, {len(names)} files")


def install(wheel: Path, folder: Path) -> Path:
    venv.create(folder / "clean", with_pip=True)
    python = folder / "clean" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", wheel)
    return python


def check_environment(python: Path, folder: Path) -> None:
    code = f"import importlib.util as u; print([n for n in {ABSENT} if u.find_spec(n)])"
    found = run(python, "-c", code, cwd=folder).strip()
    expect(found == "[]", f"the base installation pulled in {found}")


def check_commands(scripts: Path, folder: Path) -> None:
    hostile = folder / "hostile"
    hostile.mkdir()
    (hostile / "convert.py").write_text(HOSTILE)
    demo = next((folder / "clean").glob("lib/python*/site-packages/mlx_diffgemma/demo_checkpoint"))
    for command in ("generate", "convert"):
        text = run(scripts / f"mlx_diffgemma.{command}", "--help", cwd=hostile)
        expect("usage:" in text, f"mlx_diffgemma.{command} --help says {text!r}")
    text = run(scripts / "mlx_diffgemma.convert", demo, "--show", cwd=hostile)
    expect("tensors" in text and "bfloat16" in text, f"--show says {text!r}")
    ask = ("--model", "demo", "--backend", "reference", "--prompt", "12+34=", "--seed", "7")
    expect(run(scripts / "mlx_diffgemma.generate", *ask, cwd=hostile).strip(), "generate says nothing")


def run(*command: object, cwd: Path | None = None) -> str:
    """What a command prints; its failure ends the check. The caller's Python settings do not reach it."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "PYTHONPATH", "PYTHONSAFEPATH")
    }
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=kept, capture_output=True, text=True)
    expect(done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def expect(holds: object, message: str) -> None:
    if not holds:
        sys.exit(f"wheel: {message}")


if __name__ == "__main__":
    main()
