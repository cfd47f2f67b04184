"""What becomes a row of ``proven.json`` on a Mac, and what ``make mac`` and the hosted one do."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from benchmarks import mac
from mlx_diffgemma import proven
from mlx_diffgemma.mlx_backend.kernels import choice
from mlx_diffgemma.mlx_backend.kernels.chip import EMULATED, Chip
from mlx_diffgemma.mlx_backend.kernels.ops import KERNELS
from tests.metal_kernels import conftest
from tests.parity import table
from tests.proofs import Proofs, picked

ROOT = Path(__file__).parents[2]
MAX = Chip("Apple M4 Max", "applegpu_g16s")
VIRTUAL = Chip("Apple Paravirtual device", "air64_v27")
NAMES = {"kernel", "chip", "dtype", "mlx", "architecture", "macos", "date"}
A, B = Path("test_a.py"), Path("test_b.py")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "proven.json"
    found.write_text("[]\n")
    return found


# ---- rows


def test_a_row_is_written_and_replaced(path, monkeypatch):
    monkeypatch.setattr(choice, "chip_here", lambda: MAX)
    for kernel in ("look", "geglu", "look"):
        choice.prove(kernel, "bfloat16", path)
    found = proven.read_rows(path)
    assert [row["kernel"] for row in found] == ["geglu", "look"]
    assert {*found[0]} == NAMES
    assert found[0]["chip"] == "Apple M4 Max" and found[0]["mlx"] == ".".join(mx.__version__.split(".")[:2])
    assert [entry.name for entry in path.parent.iterdir()] == ["proven.json"] and len(
        path.read_text().splitlines()
    ) == 4
    assert choice.proven_here(path) == found
    monkeypatch.setattr(choice, "chip_here", lambda: Chip("Apple M4", "applegpu_g16g"))
    assert choice.proven_here(path) == []
    choice.prove("look", "bfloat16", path)
    assert len(proven.read_rows(path)) == 3, "another chip's row stays"


def test_what_is_no_chip_proves_nothing(path, monkeypatch):
    for chip, words in ((None, "CPU"), (EMULATED, "CPU"), (VIRTUAL, "virtual")):
        monkeypatch.setattr(choice, "chip_here", lambda chip=chip: chip)
        with pytest.raises(AssertionError, match=words):
            choice.prove("look", "bfloat16", path)
    monkeypatch.setattr(choice, "chip_here", lambda: MAX)
    with pytest.raises(AssertionError):
        choice.prove("norm", "bfloat16", path)
    assert proven.read_rows(path) == []


def test_rows_keep_their_lines():
    rows = [{"kernel": "look", "chip": "Apple M4"}, {"kernel": "odds", "chip": "Apple M4"}]
    assert json.loads(proven.as_text(rows)) == rows and proven.as_text([]) == "[]\n"
    assert [json.loads(line.rstrip(",")) for line in proven.as_text(rows).splitlines()[1:-1]] == rows


def test_a_row_matches_by_all_of_its_key():
    key = {"kernel": "look", "chip": "Apple M4"}
    assert proven.matches(key | {"date": "2026-11-21"}, key)
    assert not proven.matches({"kernel": "look"}, key) and not proven.matches(key | {"chip": "Apple M1"}, key)


def test_nothing_is_proven_that_was_not_run():
    """The file in the repository: rows come from ``make mac`` alone, and each names its chip, system and day."""
    for row in proven.read_rows(choice.PROVEN):
        assert {*row} == {"kernel", "chip", "dtype", "mlx", "architecture", "macos", "date"} and row[
            "kernel"
        ] in KERNELS
        assert row["architecture"].startswith("applegpu") and not Chip(row["chip"], row["architecture"]).virtual


# ---- from tests to rows


def test_only_a_chip_proves(monkeypatch):
    said, proofs = [], Proofs()
    for place in ("cpu-emulated", "metal-vm"):
        proofs.of(SimpleNamespace(path=A), place, lambda **row: said.append(row))("look", mx.float16)
    proofs.passed(A)
    proofs.finish([A])
    assert [row["what"] for row in said] == ["cpu-emulated", "metal-vm"] and said[0]["dtype"] == "float16"
    assert proofs.written == [] and [row["kernel"] for row in proofs.virtual] == ["look"]
    proofs.of(SimpleNamespace(path=B), "metal", said.append)("geglu", mx.bfloat16)
    proofs.passed(B)
    monkeypatch.setattr(choice, "prove", lambda *shown: {"row": shown})
    proofs.finish([A, B])
    assert proofs.written == [{"row": ("geglu", "bfloat16")}] and len(said) == 2


def test_places_have_their_labels(monkeypatch):
    for chip, label in ((MAX, "metal"), (VIRTUAL, "metal-vm")):
        monkeypatch.setattr(conftest, "chip_here", lambda chip=chip: chip)
        assert conftest.label("metal") == label and conftest.label("cpu-emulated") == "cpu-emulated"


@pytest.mark.parametrize(
    ("given", "some"),
    [({}, False), ({"keyword": "geglu"}, True), ({"deselect": ["a"]}, True), ({"lf": True}, True)],
    ids=str,
)
def test_a_file_of_which_tests_were_picked_proves_nothing(given, some):
    config = SimpleNamespace(getoption=lambda name, default: given.get(name, default), args=["tests"])
    assert picked(config) == some
    assert picked(SimpleNamespace(getoption=lambda name, default: default, args=["tests/test_a.py::test_b"]))


SESSION = """
import functools, pathlib, pytest
from mlx_diffgemma.mlx_backend.kernels import choice
from tests.conftest import pytest_runtest_makereport, pytest_sessionfinish, pytest_terminal_summary
from tests.metal_kernels import conftest
from tests.proofs import PROOFS

choice.chip_here = conftest.chip_here = lambda: choice.Chip({name!r}, "applegpu_g16s")
choice.prove = functools.partial(choice.prove, path=pathlib.Path(__file__).with_name("proven.json"))

@pytest.fixture
def proof(request):
    return PROOFS.of(request.node, conftest.label("metal"), lambda **row: None)
"""
GOOD = "import mlx.core as mx\ndef test_one(proof): proof('geglu', mx.float16)\ndef test_two(): pass\n"
BAD = "import mlx.core as mx\ndef test_one(proof): proof('look', mx.float16)\ndef test_two(): assert False\n"


@pytest.mark.parametrize(
    ("name", "arguments", "kernels"),
    [
        ("Apple M4 Max", [], ["geglu"]),
        ("Apple M4 Max", ["-k", "one"], []),
        ("Apple M4 Max", ["test_good.py::test_one"], []),
        ("Apple Paravirtual device", [], []),
    ],
    ids=str,
)
def test_a_session_writes_what_it_has_shown(tmp_path, path, name, arguments, kernels):
    for file, text in (("conftest.py", SESSION.format(name=name)), ("test_good.py", GOOD), ("test_bad.py", BAD)):
        (tmp_path / file).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *arguments]
    run = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100, check=False
    )
    assert "test_bad.py" in run.stdout or arguments, run.stdout + run.stderr
    assert [row["kernel"] for row in proven.read_rows(path)] == kernels
    assert ('"chip": "Apple M4 Max"' in run.stdout) == bool(kernels)
    assert ('"place": "metal-vm"' in run.stdout) == (name.endswith("device"))


def test_every_kernel_has_a_test_that_can_prove_it():
    proving = re.compile(r'proof\("(\w+)"')
    named = {name for file in Path(__file__).parent.glob("test_*.py") for name in proving.findall(file.read_text())}
    assert named == {*KERNELS}


def test_the_table_says_what_was_emulated():
    found = [{"what": "cpu-emulated", "kernel": "look", "dtype": name, "test": "t"} for name in ("float32", "bfloat16")]
    found += [{"what": "interpreted", "kernel": "soft", "dtype": "float32", "test": "t"}]
    assert table.metal(found).split() == ["cpu-emulated", "look", "bfloat16,", "float32"]
    assert table.kernels(found).split() == ["interpreted", "soft", "float32"]


# ---- make mac


def test_a_mac_needs_no_torch_to_run_these_tests():
    """Every test file here can be collected with what ``make mac`` asks for."""
    hidden = "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'triton', 'yaml'))\n"
    names = sorted(file.stem for file in Path(__file__).parent.glob("test_*.py"))
    imports = "\n".join(f"import tests.metal_kernels.{name}" for name in names)
    run = subprocess.run(
        [sys.executable, "-c", hidden + imports], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def targets() -> set[str]:
    return {*re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M)}


def test_the_workflow_calls_what_there_is():
    import yaml  # of the test environment, which a Mac that runs these files need not have

    workflow = yaml.safe_load((ROOT / ".github/workflows/macos.yml").read_text())
    job = workflow["jobs"]["metal-vm"]
    assert job["strategy"]["matrix"]["os"] == ["macos-15", "macos-26"] and workflow["name"] == "metal-vm"
    steps = job["steps"]
    assert {"python-version": "3.11"} in [step.get("with") for step in steps]
    lines = [step["run"] for step in steps if "run" in step]
    made = [line.split()[1] for line in lines if line.startswith("make ")]
    assert made == ["setup", "mac", "mac-plain"] and {*made} <= targets()
    watched = re.search(r"git diff --exit-code -- (\S+)", "\n".join(lines))
    assert watched and ROOT / watched[1] == choice.PROVEN


@pytest.mark.parametrize(
    ("system", "machine", "version", "missing", "words"),
    [
        ("linux", "x86_64", ("3", "11", "9"), (), "no Mac with Apple silicon"),
        ("darwin", "x86_64", ("3", "11", "9"), (), "no Mac with Apple silicon"),
        ("darwin", "arm64", ("3", "9", "6"), (), "3.11 or newer is needed: `make setup`"),
        ("darwin", "arm64", ("3", "11", "9"), ("mlx", "pytest"), "has no mlx, pytest: `make setup`"),
        ("darwin", "arm64", ("3", "11", "9"), (), "sees no Metal GPU"),
    ],
    ids=str,
)
def test_what_is_missing_is_said_on_one_line(monkeypatch, system, machine, version, missing, words):
    find = mac.importlib.util.find_spec
    monkeypatch.setattr(mac.sys, "platform", system)
    monkeypatch.setattr(mac.platform, "python_version_tuple", lambda: version)
    monkeypatch.setattr(mac.platform, "machine", lambda: machine)
    monkeypatch.setattr(mac.importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert words in mac.problem() and "\n" not in mac.problem()


def test_elsewhere_make_mac_stops_before_anything_is_run(monkeypatch, capsys):
    monkeypatch.setattr(mac, "problem", lambda: "this is no Mac")
    monkeypatch.setattr(sys, "argv", ["mac", "--model", "demo"])
    assert mac.main() == 2 and capsys.readouterr().err == "make mac: this is no Mac\n"


@pytest.mark.parametrize("chip", [MAX, VIRTUAL], ids=lambda chip: chip.name)
def test_tests_run_and_then_the_benchmark_whatever_they_say(chip, monkeypatch, capsys):
    run = []
    monkeypatch.setattr(mac, "problem", lambda: "")
    monkeypatch.setattr("mlx_diffgemma.mlx_backend.kernels.chip.chip_here", lambda: chip)
    monkeypatch.setattr(choice, "proven_here", lambda: [{"kernel": "look", "chip": chip.name}])
    monkeypatch.setattr(mac.subprocess, "call", lambda command, cwd: run.append(command[2:]) or len(run) % 2)
    monkeypatch.setattr(sys, "argv", ["mac", "--model", "demo"])
    assert mac.main() == 1, "of the tests"
    assert run[0][:3] == ["pytest", "-m", "metal"] and "tests/metal_kernels" in run[0]
    assert run[1] == ["mlx_diffgemma", "bench", "--model", "demo", "--json", "build/mac/bench.json"]
    said = capsys.readouterr().out
    assert ("--ignore-glob=tests/metal_kernels/test_attention*.py" in run[0]) == chip.virtual
    assert ('{"kernel": "look"' in said) != chip.virtual and ("metal-vm" in said) == chip.virtual


def test_peers_that_are_installed_and_have_room_are_measured_too(monkeypatch, capsys):
    monkeypatch.setattr(mac.importlib.util, "find_spec", lambda name: name in ("mlx_lm", "mlx_vlm"))
    both = ["--against-ar", mac.AUTOREGRESSIVE, "--against", "mlx-vlm"]
    assert mac.peers("some/model", 96 * 10**9) == both and mac.peers("demo", 96 * 10**9) == []
    assert mac.commands("some/model", False, both)[1][-4:] == both
    assert capsys.readouterr().out == ""
    assert mac.peers("some/model", 40 * 10**9) == both[:2] and "mlx_vlm is left out: 40 GB" in capsys.readouterr().out
    assert mac.peers("some/model", 17 * 10**9) == []
    monkeypatch.setattr(mac.importlib.util, "find_spec", lambda name: None)
    assert mac.peers("some/model", 96 * 10**9) == []


def test_what_a_virtual_machine_leaves_out_is_what_needs_matrices():
    """Kernels with simdgroup_matrix stand in files whose tests are left out, and those tests prove no other kernel."""

    def left_out(name: str) -> bool:
        return fnmatch.fnmatch(f"{mac.TESTS}/{name}", mac.WITH_MATRICES)

    matrices = re.compile(r"simdgroup_(matrix<|float8x8|half8x8|bfloat8x8|load|store|multiply)")
    files = [file.stem for file in choice.PROVEN.parent.glob("*.py") if matrices.search(file.read_text())]
    assert files and all(left_out(f"test_{name}.py") for name in files)
    texts = [file.read_text() for file in Path(__file__).parent.glob("test_*.py") if left_out(file.name)]
    assert {name for text in texts for name in re.findall(r'proof\("(\w+)"', text)} == {*choice.MATRICES}
