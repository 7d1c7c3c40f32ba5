# `make` alone says what there is. Everything runs in .venv, which is made and filled when a target first needs it.
.DEFAULT_GOAL := help
.PHONY: help figures test lab book bench bench-faults publish prepare versions readme clean-venv

# Candidates, the first that is >= 3.10 and can make a venv is taken; another one: make PYTHON=/path/to/python3 …
PYTHON ?= python3 python3.13 python3.12 python3.11 python3.10 python3.14 python
BIN := .venv/bin
INSTALLED := .venv/.installed
# make TORCH=cpu installs PyTorch's build without CUDA, where .venv is not there yet; TORCH_INDEX is where it comes from.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH is $(TORCH); it is cpu, or not given for the build of PyPI, which has CUDA on Linux)
endif
BROWSER := .venv/.browser
# The book needs no PyTorch: where .venv is not there, it gets a small environment of its own.
BOOK_VENV := $(if $(wildcard .venv/.installed),.venv,.venv-book)
BOOK := $(if $(filter test,$(MAKECMDGOALS)),.venv,$(BOOK_VENV))/.book

help: ## this list
	@echo "Understanding the effect of sparsity on neural networks' robustness, as a paper you can run."
	@echo "The first target installs into .venv, 6 GB; 2 GB with PyTorch for CPUs only: make figures TORCH=cpu"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

figures: $(BROWSER) ## draw the figures, on tiny data unless told otherwise: make figures ARGS="fig01 --preset laptop2"
	@$(BIN)/sparse-nb figures $(or $(ARGS),--workers 2)

test: $(BROWSER) $(BOOK) ## is all in step, the notebooks, their outputs, pytest: a line for each
	@$(BIN)/python .ci/stages.py

lab: $(INSTALLED) ## the explorer and the notebooks, in JupyterLab; as root: make lab ARGS=--allow-root
	@$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/explore.ipynb $(ARGS)

book: $(BOOK) ## the book, from stored outputs, in docs/_build/html; runs no notebook, needs no PyTorch
	@$(dir $(BOOK))bin/python .ci/book.py $(ARGS)

bench: $(INSTALLED) ## ratios measured side by side in one run
	@$(BIN)/python benchmarks/bench.py $(ARGS)

bench-faults: $(BROWSER) ## kills, crashes, damage, full disks in full numbers: what survives (half an hour)
	@$(BIN)/python .ci/faults.py

PRESET ?= laptop
RUNS ?= runs
publish: $(BROWSER) ## after a sweep: figures, claims and runs that are finished, and the front page, from RUNS=runs PRESET=laptop
	@test ! -e results/$(PRESET) || $(BIN)/sparse-nb merge results/$(PRESET) --runs $(RUNS)
	@$(BIN)/sparse-nb figures --finished --preset $(PRESET) --runs $(RUNS)
	@$(BIN)/sparse-nb claims --preset $(PRESET) --runs $(RUNS)
	@$(BIN)/sparse-nb export --preset $(PRESET) --runs $(RUNS)
	@$(BIN)/python .ci/book.py explorer
	@$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace nbs/published.ipynb nbs/index.ipynb
	@$(MAKE) --no-print-directory prepare

prepare: $(INSTALLED) ## before a commit: export, clean, README.md; what `make test` then finds in step
	@$(BIN)/python .ci/prepare.py

versions: $(INSTALLED) ## after a change of code that shapes numbers: did the numbers change? renews versions.lock if not
	@$(BIN)/python .ci/versions.py $(ARGS)

readme: $(INSTALLED) ## README.md from nbs/index.ipynb
	@$(BIN)/python .ci/readme.py

clean-venv: ## remove .venv (6 GB, or 2 GB with TORCH=cpu), and that of the book
	rm -rf .venv .venv-book

# Make a virtual environment, $(1), unless it is there.
define make_venv
	if ! $(1)/bin/python -c 'import pip' 2>/dev/null; then \
	    found=; \
	    for python in $(PYTHON); do \
	        if "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "No Python >= 3.10 with venv among: $(PYTHON). Install one (Debian, Ubuntu: apt-get install python3-venv)" \
	             "or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
	    fi; \
	    echo "Making $(1) with $$("$$found" --version)"; \
	    "$$found" -m venv --clear $(1); \
	fi
endef

# The one install, repeated only when its inputs changed.
$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt
	@set -e; \
	$(call make_venv,.venv); \
	if [ "$(TORCH)" = cpu ] && ! $(BIN)/python -m pip install -q --disable-pip-version-check --retries 1 --timeout 60 --no-deps \
	        -c constraints.txt --index-url $(TORCH_INDEX) torch torchvision >.venv/install.log 2>&1; then \
	    echo "TORCH=cpu: $(TORCH_INDEX) cannot be reached, or lacks the $$(grep '^torch==' constraints.txt) of constraints.txt for" \
	         "this Python (.venv/install.log). Another index: make TORCH=cpu TORCH_INDEX=https://… Or leave TORCH=cpu out: 6 GB." >&2; exit 1; \
	fi; \
	printf 'Installing what constraints.txt locks, %s, some minutes ' "$(if $(TORCH),2 GB,6 GB)"; \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' >.venv/install.log 2>&1 & pip=$$!; \
	trap 'kill $$pip; exit 130' INT TERM; \
	while kill -0 $$pip 2>/dev/null; do printf .; sleep 3; done; \
	if wait $$pip; then echo ' done'; touch $@; else echo ' failed:'; tail -n 30 .venv/install.log; exit 1; fi

# Figures become SVG and PNG through a Chrome or Chromium; without one they are HTML and CSV, and it is looked for again.
$(BROWSER): $(INSTALLED) .ci/browser.py
	@! $(BIN)/python .ci/browser.py || touch $@

.venv/.book: $(INSTALLED)
.venv/.book .venv-book/.book: settings.ini constraints.txt
	@set -e; \
	$(call make_venv,$(@D)); \
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	    $$(awk -F ' = ' '/^docs_requirements/ { print $$2 }' settings.ini)
	@touch $@
