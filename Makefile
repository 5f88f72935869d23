# SPDX-License-Identifier: Apache-2.0
# make demo | test | reliability | env | lint | format | wheel | manylinux | dist | clean
# Needed: Python 3.11 or later, pip, git; everything else is fetched.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
# auto, cpu or gpu: see requirements/make_env.py
DEVICE ?= auto
RUN = $(VENV)/bin/python -m
PYTEST_ARGS ?=
TORCH_LIBRARIES = libc10.so libtorch.so libtorch_cpu.so
# The environment is installed uncompiled; without cached bytecode every later process would pay for that again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test reliability env lint format wheel manylinux dist clean

demo: env
	@$(RUN) benchmarks.demo

test: env
	@$(RUN) pytest $(PYTEST_ARGS)

reliability: env
	@KQSVD_RELIABILITY=long $(RUN) pytest -m reliability -s --durations=20 $(PYTEST_ARGS) tests

env:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later was not found; name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) requirements/make_env.py --device $(DEVICE) --venv $(VENV)

lint: env
	@$(RUN) pytest tests/test_lint.py

format: env
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

wheel: env
	@rm -rf build/lib build/bdist.*
	@$(RUN) pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

# The CUDA wheel under the tag of the oldest glibc it runs with, which is that of this machine. torch's own libraries stay
# outside: they are the user's.
manylinux: env
	@rm -rf build/lib build/bdist.* build/cuda
	@KQSVD_BUILD_CUDA=1 $(RUN) pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/cuda .
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) auditwheel repair --wheel-dir dist $(TORCH_LIBRARIES:%=--exclude %) build/cuda/*.whl

dist: wheel
	@KQSVD_BUILD_CUDA=0 $(VENV)/bin/python setup.py --quiet sdist

clean:
	rm -rf build dist .venv *.egg-info
