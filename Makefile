# Everything runs in .venv, which the first target that needs it makes. Needed beforehand: make and Python 3.11 or newer.
PYTHON ?= python3
JOBS ?= 2
PIP = .venv/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

# The Linux wheel of MLX links a slow reference BLAS; MKL, where it is installed, takes its place.
MKL = $$(ls $(CURDIR)/.venv/lib/libmkl_rt.so.* 2>/dev/null | head -n 1)
RUN = LD_PRELOAD="$(MKL)" .venv/bin/python

.PHONY: setup demo test soak bench gpu mac mac-plain lint clean

setup: .venv/.test

demo: .venv/.demo
	$(RUN) demo/run.py

# tests/peers run stock mlx-vlm, in its own environment
test: .venv/.test .venv-bench/.ready
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --durations 10

soak: .venv/.test
	$(RUN) -m pytest -m "soak and not gpu and not metal"

# Side by side with the peers, in a few minutes on a quiet machine. BENCH=--quick is what CI runs.
bench: .venv/.test .venv-bench/.ready
	.venv/bin/python -m benchmarks.peers $(BENCH)
	.venv/bin/python -m benchmarks.convert $(BENCH)

# On a machine with a GPU, which may be offline: no environment is made, PYTHON is the interpreter that has torch, Triton,
# pytest and transformers. The kernels' tests write down what is proven; should one fail, measuring goes on without it.
# BENCH=--quick for the first minutes on a new card; benchmarks/LOG.md says what to run in which order.
gpu:
	@$(PYTHON) -c 'import importlib.util as u, sys; missing = [m for m in ("torch", "triton", "pytest") if not u.find_spec(m)]; \
	sys.exit(f"make gpu: {sys.executable} has no {chr(44).join(missing)}; give PYTHON=/path/to/one that has" if missing else 0)'
	@$(PYTHON) -c 'import torch, sys; \
	sys.exit(not torch.cuda.is_available() and f"make gpu: no CUDA GPU is visible to torch in {sys.executable}")'
	TRITON_INTERPRET=0 $(PYTHON) -m pytest -m gpu --continue-on-collection-errors tests/kernels tests/backends/test_graphs.py; status=$$?; \
	$(PYTHON) -m benchmarks.gpu $(BENCH) && exit $$status

# On a Mac with Apple silicon, in .venv or in the PYTHON that is given: the kernels' tests on its GPU, which write down what
# is proven, then MODEL measured. The default is 16.5 GB to download; MODEL=demo for a quick try.
MODEL ?= mlx-community/diffusiongemma-26B-A4B-it-4bit
MAC = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard .venv/bin/python),$(PYTHON)),$(PYTHON))

mac:
	@$(MAC) -m benchmarks.mac --model $(MODEL)

# The tests of plain MLX operations, on its GPU.
mac-plain: .venv/.test
	.venv/bin/python -m pytest tests/backends/test_mlx_*.py

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-bench build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/it")'
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[mlx]'
	touch $@

# torch first and alone: where a CPU build of 2.13.0 is offered, pip takes it; a looser range would fetch CUDA.
.venv/.test: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) torch==2.13.0
	$(PIP) -e '.[mlx,test]'
	touch $@ .venv/.demo

# mlx-vlm has an environment of its own: its dependencies must not leak into the tests.
.venv-bench/.ready: Makefile constraints.txt | .venv/bin/python
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt \
		'mlx[cpu]; sys_platform == "linux"' mlx mlx-vlm==0.7.10
	touch $@
