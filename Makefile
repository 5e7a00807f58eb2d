# make demo: the whole chain on phantoms, pictures at the end.  make test: the full suite.  Both do all set-up first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LIBTPU := build/libtpu
LIBTPU_VERSION := 0.0.42
LIBTPU_INSTALLED := $(LIBTPU)/.installed-$(LIBTPU_VERSION)
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-tpu test-beam test-slurm lint parity parity-full pods clean

demo: $(VENV)/.installed
	$(BIN)/python -m launch.demo --out build/demo

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40
ifeq ($(shell uname -sm),Linux x86_64)
	$(MAKE) test-tpu TPU_TESTS='$(TPU_TESTS) -k "two or kernel or layout"'
endif

# Compiling for TPUs, which needs none of them. The compiler is there for Linux on x86 alone; make test takes the kernel and
# one program.
TPU_TESTS := tests/test_device_compilers.py
test-tpu: $(VENV)/.test-installed $(LIBTPU_INSTALLED)
	PYTHONPATH=$(CURDIR)/$(LIBTPU) $(BIN)/python -m pytest -n 2 $(TPU_TESTS)

# Apache Beam needs older packages than the rest: writing data sets with it is tested in an environment of its own.
test-beam: $(VENV)-beam/.installed
	$(VENV)-beam/bin/python -m pytest tests/test_shards.py tests/test_images.py

# launch/slurm.sh on a Slurm of one node; Debian's packages are unpacked into build/slurm, nothing is installed.
test-slurm: $(VENV)/.test-installed
	rm -rf build/slurm && mkdir -p build/slurm
	cd build/slurm && apt-get download slurmctld slurmd slurm-client slurm-wlm-basic-plugins libhwloc15
	for package in build/slurm/*.deb; do dpkg -x $$package build/slurm; done
	SLURM_ROOT=$(CURDIR)/build/slurm $(BIN)/python -m pytest tests/test_slurm.py

# Differences from torch, written to docs/parity.md and docs/parity_full.md (the latter takes 10 GiB of memory).
parity: $(VENV)/.test-installed
	$(BIN)/python -m benchmarks.parity

parity-full: $(VENV)/.test-installed
	$(BIN)/python -m benchmarks.parity_full

# docs/pods.md: the chest config compiled for TPU slices, each 14 to 32 minutes of two cores; goes on where it was stopped.
pods: $(VENV)/.test-installed $(LIBTPU_INSTALLED)
	PYTHONPATH=$(CURDIR)/$(LIBTPU) $(BIN)/python -m benchmarks.pods

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed requirements-test.txt
	$(BIN)/pip install --quiet --requirement requirements-test.txt
	touch $@

# The TPU compiler stays out of the environment: with it, JAX would look for a TPU.
$(LIBTPU_INSTALLED): | $(VENV)/.installed
	$(BIN)/pip install --quiet --upgrade --no-deps --target $(LIBTPU) libtpu==$(LIBTPU_VERSION)
	touch $@

$(VENV)-beam/.installed: requirements.txt requirements-beam.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-beam
	$(VENV)-beam/bin/pip install --quiet --upgrade pip
	$(VENV)-beam/bin/pip install --quiet --editable '.[beam]' tensorflow-cpu==2.21.0 'pytest>=9.2,<10'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-beam build
