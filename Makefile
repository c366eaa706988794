# make demo    a real model decodes prompts, plainly and with trees
# make test    the test suite
# make aot     compiles every Triton variant for sm_80, sm_90 and sm_100, without a GPU
# make lint    ruff, clang-format, mypy
# make sanitize  a small run of each operator under compute-sanitizer (needs a GPU)
# make bench   the benchmarks of the operators (needs a GPU)
#
# Each sets up what it needs in .venv. Where python3 has a torch with a GPU already, that one is used as it is, offline.

PYTHON ?= python3
GPU_ARCH := $(shell $(PYTHON) -c "import torch; print('%d%d' % torch.cuda.get_device_capability())" 2>/dev/null)

ifeq ($(GPU_ARCH),)
PY := .venv/bin/python
READY := .venv/ready
else
PY := $(PYTHON)
READY :=
export MEDUSA_KERNELS_CUDA_ARCHS ?= $(GPU_ARCH)
endif

JOBS := $(shell n=$$(nproc); echo $$((n > 12 ? 12 : n)))

.PHONY: demo test aot lint sanitize bench build clean

demo: build
	$(PY) -m medusa_kernels.decoding.demo

test: build
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --ignore=tests/test_aot.py

aot: build
	TRITON_INTERPRET=0 $(PY) -m pytest -q -n $(JOBS) tests/test_aot.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(if $(READY),.venv/bin/)clang-format --dry-run -Werror csrc/* $(wildcard tests/*.cpp tests/cuda_on_cpu/*)
	$(PY) -m mypy

SANITIZER := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1

sanitize: build
	$(SANITIZER) --tool memcheck $(PY) tests/sanitize.py
	$(SANITIZER) --tool racecheck $(PY) tests/sanitize.py
	$(SANITIZER) --tool initcheck $(PY) tests/sanitize.py

bench: build
	$(PY) benchmarks/run.py

# Compiles what has changed, next to the Python files.
build: $(READY)
	$(PY) setup.py -q build_ext --inplace

.venv/ready: requirements-ci.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements-ci.txt
	MEDUSA_KERNELS_BUILD=none .venv/bin/pip install -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build .venv *.egg-info medusa_kernels/*.so
