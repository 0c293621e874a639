# `make demo` and `make test` do all the set-up they need; Python >= 3.11, git and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/shapes
DEMO_DATA ?= runs/shapes_data
ifdef PIP_CONSTRAINT  # tests call pip in other folders
override PIP_CONSTRAINT := $(foreach file,$(PIP_CONSTRAINT),$(or $(realpath $(file)),$(file)))
export PIP_CONSTRAINT
endif

.PHONY: demo test test-fast parity gpu-compile optional package docs lint clean help

help:
	@echo "make demo       generate data, train, evaluate, draw (6 to 19 minutes on 2 cores)"
	@echo "make test       run all tests (8 to 37 minutes on 2 cores)"
	@echo "make test-fast  run the tests that take less than half a minute"
	@echo "make parity     compare with torchvision, where torch is installed (10 minutes or more)"
	@echo "make gpu-compile  compile for an NVIDIA GPU, which need not be there, and check (3 minutes)"
	@echo "make optional   test what needs timm, huggingface_hub, ONNX or loggers (they are installed)"
	@echo "make package    build wheel and sdist into dist/, install each into an empty environment, predict"
	@echo "make docs       build the documentation's site into build/docs/"
	@echo "make lint       check style and types"
	@echo "make clean      remove the environment, caches and the demo's runs"

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.installed: requirements.txt | $(VENV)/.made
	$(BIN)/pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	@touch $@

$(VENV)/.installed-docs: requirements-docs.txt | $(VENV)/.made
	$(BIN)/pip install --quiet -r requirements-docs.txt
	@touch $@

$(DEMO_DATA)/.generated: mrcnn_jax/datasets/shapes.py | $(VENV)/.installed
	$(BIN)/python -m mrcnn_jax generate shapes --out $(DEMO_DATA) --train 4000
	@touch $@

# Run again after an interruption, `make demo` resumes.
demo: $(VENV)/.installed $(DEMO_DATA)/.generated
	$(BIN)/python train.py $(DEMO_DATA) --workdir $(DEMO) --stages.0.epochs 2 \
		--data.short-side 160 --data.long-side 160 --data.augment.scale 1 1
	$(BIN)/python eval.py --workdir $(DEMO)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

# torch is never installed here: see docs/correctness.md. XLA generates code as for users, if with
# less effort (tests/conftest.py).
parity: $(VENV)/.installed-dev
	@$(BIN)/python -c 'import torch, torchvision' || \
		{ echo "make parity: nothing was compared, torch and torchvision do not import"; exit 1; }
	XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" \
		$(BIN)/python -m pytest -n 2 tests/parity

# XLA's compiler for CUDA, 140 MB, beside the environment: in it, jax would look for a GPU. The tests
# start processes that compile on one core each.
gpu-compile: $(VENV)/.installed-dev
	@version=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') || exit 1; \
	plugin=$(abspath $(VENV))/gpu-$$version; \
	if [ -d $$plugin/jax_plugins ] || $(BIN)/pip install --quiet --no-deps --target $$plugin \
		jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version; then \
		MRCNN_CUDA_PLUGIN=$$plugin $(BIN)/python -m pytest -n 2 --dist load tests/gpu_compile; \
	else \
		echo "make gpu-compile: nothing was compiled, its wheels cannot be installed"; exit 1; \
	fi

# Packages that single commands need: timm, the Hub, ONNX, loggers, supervision. Last, since no other
# test has them to lean on. What would not import would be skipped. timm needs torch, which is never
# installed here.
optional: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet -r requirements-hub.txt -r requirements-loggers.txt \
		-r requirements-onnx.txt supervision
	$(BIN)/pip install --quiet --no-deps timm 'jax2onnx>=0.17.1'
	$(BIN)/python -c 'import huggingface_hub, jax2onnx, mlflow, onnx, onnxruntime, supervision, wandb'
	$(BIN)/python -m pytest -n 2 -rs tests/runs/test_hub.py tests/runs/test_loggers.py \
		tests/commands/test_export_onnx.py tests/inference/test_results.py tests/parity/test_timm.py

package: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	MRCNN_DIST=$(abspath dist) $(BIN)/python -m pytest -n 0 tests/package

# Without a network. A broken link or anchor is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet -c docs . build/docs
	@echo "build/docs/index.html"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .jax_cache build dist mrcnn_jax.egg-info $(DEMO) $(DEMO_DATA)
