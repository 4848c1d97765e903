# Every target sets up what it needs: .venv is made on the first run and again when
# pyproject.toml or constraints.txt changes. Needed beforehand: python3 (3.11 or newer), make, git.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

# Empty means off: where it is set, every process would compile torch and Transformers again, some ten seconds each.
export PYTHONDONTWRITEBYTECODE :=

VENV := .venv
BIN := $(VENV)/bin
PACKAGE := $(VENV)/.package
STAMP := $(VENV)/.installed
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
PIP_DOWNLOAD := -m pip download --quiet --disable-pip-version-check

# Tests need no network; one torch thread a worker, so that the workers don't fight over the cores;
# PATH, so that a test finds `accelerate` and `hesso-hf` by name.
pytest_of = PATH="$(CURDIR)/$(1)/bin:$$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	$(1)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST := $(call pytest_of,$(VENV))

# Two environments beside .venv. Without a version, pip takes the newest torch, which may be a CUDA build of several GB.
NEWEST := .venv-newest
FLOOR := .venv-floor
TORCH ?= $(shell grep '^torch==' constraints.txt)
LOOK := .venv-look
ENGINES := .venv-engines
PAGES ?= quickstart/hesso/report.html

.PHONY: help setup quickstart test test-slow test-newest test-floor test-engines coverage lint format docs report-look wheel-test bench gpu notebooks picture survey clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 13
	@echo
	@echo "test-newest takes $(TORCH), not the newest torch, which may be a CUDA build of several GB; TORCH=torch takes that."
	@echo "Variables: ARGS='...' is passed on to the command, WORKERS=$(WORKERS) test processes, PYTHON=$(PYTHON),"
	@echo "PAGES=$(PAGES) for report-look."

$(PACKAGE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.11 or newer is needed for constraints.txt; $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.11" if v < (3, 11) else 0)'
	@echo "Setting up $(VENV): a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) --no-compile -e '.[plots]'
	@touch $@

$(STAMP): $(PACKAGE)
	@echo "Adding the development tools"
	@$(BIN)/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@

setup: $(STAMP) ## make .venv with the package and the development tools

quickstart: $(PACKAGE) ## prune the bundled model, end to end
	$(BIN)/hesso-hf quickstart $(ARGS)

test: $(STAMP) ## the default tests
	$(PYTEST) $(ARGS)

test-slow: $(STAMP) ## all tests, the slow ones too
	$(PYTEST) -m "not engines" --timeout 1800 $(ARGS)

test-newest: ## the default tests with the newest releases on the index, in .venv-newest
	@$(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager '$(TORCH)' -e '.[dev]'
	$(call pytest_of,$(NEWEST)) $(ARGS)

test-floor: ## the default tests with the oldest releases that pyproject.toml allows, in .venv-floor
	@$(PYTHON) -m venv $(FLOOR)
	@$(FLOOR)/bin/python .ci/floors.py trl > $(FLOOR)/floors.txt
	@$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check -c $(FLOOR)/floors.txt -e '.[dev]'
	$(call pytest_of,$(FLOOR)) $(ARGS)

# The converter for llama.cpp comes with the sources of its Python package, which is built here (some minutes).
test-engines: ## small models in ONNX Runtime, OpenVINO, AOTInductor and llama.cpp, optimizers in 8 bits, in .venv-engines
	@$(PYTHON) -m venv $(ENGINES)
	@$(ENGINES)/bin/python $(PIP_INSTALL) -e '.[dev]' onnx onnxruntime onnxscript openvino gguf sentencepiece \
		bitsandbytes torchao
	@$(ENGINES)/bin/python $(PIP_DOWNLOAD) --no-deps --no-binary llama-cpp-python -d $(ENGINES)/llama llama-cpp-python
	@tar xzf $(ENGINES)/llama/*.tar.gz --strip-components 1 -C $(ENGINES)/llama
	@$(ENGINES)/bin/python $(PIP_INSTALL) $(ENGINES)/llama/*.tar.gz
	GGUF_CONVERTER=$(CURDIR)/$(ENGINES)/llama/vendor/llama.cpp/convert_hf_to_gguf.py $(call pytest_of,$(ENGINES)) -m engines $(ARGS)

coverage: $(STAMP) ## the default tests, with what they leave uncovered
	$(PYTEST) --cov --cov-report=term-missing $(ARGS)

lint: $(STAMP) ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hesso_hf

format: $(STAMP) ## let ruff fix and format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: $(STAMP) ## the docs as a site, in docs/_build
	$(BIN)/python docs/options.py --check || { echo "docs/options.md isn't what the dataclasses have: python docs/options.py"; exit 1; }
	$(BIN)/python docs/pictures.py --check
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

report-look: ## open PAGES (the quickstart's report) in headless Chromium; pictures in report-look, errors fail
	@test -e $(LOOK) || $(PYTHON) -m venv $(LOOK)
	@$(LOOK)/bin/python -m pip install --quiet --disable-pip-version-check PyQt6-WebEngine
	@test -e '$(firstword $(PAGES))' || $(MAKE) quickstart
	@$(LOOK)/bin/python .ci/look.py report-look $(PAGES) 2> report-look.log || { tail -5 report-look.log; exit 1; }

# The wheel is built through the sdist and installed with its own dependencies only, so a file or a
# requirement that is missing from the metadata is missing here too.
wheel-test: $(STAMP) ## build the wheel, install it in an empty environment, use it there; the same for an editable clone
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; export LC_ALL=C; unset PYTHONPATH; \
	mkdir "$$tmp/src" "$$tmp/empty"; \
	cp -r hesso_hf pyproject.toml README.md LICENSE "$$tmp/src"; \
	find "$$tmp/src" -name __pycache__ -prune -exec rm -rf {} +; \
	echo "building the sdist and the wheel"; \
	$(BIN)/python -m build --outdir "$$tmp/dist" "$$tmp/src" > "$$tmp/build.log" 2>&1 || { cat "$$tmp/build.log"; exit 1; }; \
	(cd "$$tmp/src"; find hesso_hf -type f | sort) > "$$tmp/expected"; \
	$(BIN)/python -m zipfile -l "$$tmp"/dist/*.whl | awk '/^hesso_hf\// {print $$1}' | sort > "$$tmp/packed"; \
	diff "$$tmp/expected" "$$tmp/packed" || { echo "the wheel (>) lacks or adds files (<: the source tree)"; exit 1; }; \
	grep -q '^hesso_hf/bundled/' "$$tmp/packed" || { echo "no hesso_hf/bundled in the wheel"; exit 1; }; \
	echo "installing the wheel in an empty environment"; \
	$(BIN)/python -m venv "$$tmp/venv"; \
	"$$tmp/venv/bin/python" $(PIP_INSTALL) --no-compile "$$tmp"/dist/*.whl; \
	"$$tmp/venv/bin/python" -m pip check; \
	cd "$$tmp/empty"; \
	"$$tmp/venv/bin/python" -c 'import sys, hesso_hf; heavy = {"torch", "transformers", "accelerate", "datasets", "peft", "numpy"} & set(sys.modules); sys.exit(f"import hesso_hf also imports {sorted(heavy)}" if heavy else 0)'; \
	"$$tmp/venv/bin/hesso-hf" --help > /dev/null; \
	echo "installing a clone called hesso_hf editable, using it from the folder beside it"; \
	mkdir "$$tmp/beside"; cp -r "$$tmp/src" "$$tmp/beside/hesso_hf"; rm -rf "$$tmp/beside/hesso_hf"/*.egg-info; \
	"$$tmp/venv/bin/python" -m pip uninstall --quiet --yes hesso_hf; \
	"$$tmp/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e "$$tmp/beside/hesso_hf"; \
	cd "$$tmp/beside"; \
	echo 'from hesso_hf import HessoConfig; print(HessoConfig(pruning_ratio=0.5).pruning_ratio)' > script.py; \
	(cd hesso_hf; "$$tmp/venv/bin/python" ../script.py > /dev/null); \
	"$$tmp/venv/bin/python" script.py > /dev/null; "$$tmp/venv/bin/python" -c 'from hesso_hf import HessoConfig'; \
	echo "wheel-test passed: $$(wc -l < "$$tmp/packed") files in $$(basename "$$tmp"/dist/*.whl)"

bench: $(STAMP) ## benchmarks/quality.py, whose results are committed under benchmarks/results
	$(BIN)/python benchmarks/quality.py --model stories260K --ratios 0.3 0.5 --seeds 0 1 2 $(ARGS)

gpu: $(STAMP) ## all that needs a GPU, in parts of at most 9 minutes; a second call goes on (benchmarks/gpu.py)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python benchmarks/gpu.py $(ARGS)

notebooks: $(STAMP) ## run the notebooks and keep their outputs, about 10 minutes
	$(BIN)/python .ci/notebooks.py $(ARGS)

picture: $(STAMP) ## docs/quality.svg, of what benchmarks/quality.py measured
	$(BIN)/python benchmarks/picture.py $(ARGS)

survey: $(STAMP) ## docs/architectures.json and .md: what can be pruned in every model type, about 30 minutes
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/hesso-hf survey --jobs $(WORKERS) $(ARGS)

clean: ## remove caches and build products (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.* htmlcov
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
