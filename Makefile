# Every target sets itself up: a virtual environment, the package in editable form, the C extension where a compiler is.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# `make test EXTRAS=test,bench,peers` adds the comparisons with bitsandbytes, transformers and PEFT.
EXTRAS ?= test,bench
# constraints.txt pins what CI runs, on a CPU; on a GPU machine torch brings its own triton, so the ranges decide.
CONSTRAINTS := $(if $(shell command -v nvidia-smi rocm-smi 2>/dev/null),,-c constraints.txt)
comma  := ,
STAMP  := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
PYTEST := PYTHONSAFEPATH=1 TRITON_DEFAULT_FP_FUSION=1 $(BIN)/pytest -q
# `make test-triton VERSION=3.6`, of triton 3.6 to 3.9. AOT=0 compiles each kernel once, 1 every setting, 2 every pair of settings,
# "all" everything; TARGETS="sm_80 or gfx942" names targets.
VERSION ?= 3.6
OTHER  := $(abspath $(VENV))/triton-$(VERSION)
AOT    ?= 1
TARGETS ?= sm or gfx
DRAFTS := $(addprefix benchmarks/results/drafts/,draft/model medusa/heads eagle/heads)
# set to "not real" where the model and the data must not be downloaded
REAL   ?=

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-gpu test-triton lint aot counters drafts bench wheel clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:[^#]*##/\t/' | expand -t 14

install: $(STAMP) ## the virtual environment, with everything in it

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*.c kernels/cpu/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip setuptools wheel
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@$(BIN)/posttrain doctor
	@touch $@

quickstart: $(STAMP) ## fetch a real model and data, fine-tune in 4 bits, write report.md (minutes on two cores)
	$(BIN)/posttrain quickstart

# Three processes: triton decides at import whether it interprets, and gpuemu replaces its driver.
test: $(STAMP)   ## oracles, interpreter, native CPU, ahead-of-time compilation, emulated kernels, models
	TRITON_INTERPRET=1 $(PYTEST) -m interpret
	$(PYTEST) -m "aot or emulated"
	$(PYTEST) $(if $(REAL),-m "$(REAL)")

test-gpu: $(STAMP) ## the same kernel tests, compiled, on this machine's GPU
	$(PYTEST) -m gpu

# Beside the environment, in a folder that comes first on the path; triton 3.6's interpreter does not know numpy 2.4.
test-triton: $(STAMP) ## the kernels under another triton, without a GPU: make test-triton VERSION=3.6
	test -d $(OTHER) || $(BIN)/python -m pip install -q --no-deps --target $(OTHER) 'triton==$(VERSION).*' 'numpy<2.4'
	PYTHONPATH=$(OTHER) $(BIN)/python -c 'from triton import __version__ as v; assert v.startswith("$(VERSION)."), v; print("triton", v)'
	PYTHONPATH=$(OTHER) TRITON_INTERPRET=1 $(PYTEST) -m interpret
	PYTHONPATH=$(OTHER) POSTTRAIN_AOT=$(AOT) $(PYTEST) -m aot -k "$(TARGETS)"

aot: $(STAMP)    ## registers, spills, shared memory, occupancy, load width, bytes of every compiled kernel
	PYTHONSAFEPATH=1 $(BIN)/python benchmarks/aot.py

counters: $(STAMP) ## instructions and bytes of each kernel beside its peers', in the emulator (needs gpuemu)
	PYTHONSAFEPATH=1 $(BIN)/python benchmarks/counters.py

drafts: $(DRAFTS) ## a small model and heads that draft for SmolLM2-135M, trained once for the benchmark (half an hour)

$(DRAFTS): | $(STAMP)
	$(BIN)/posttrain speculative train-draft --kind $(word 4,$(subst /, ,$@)) --model smollm2-135m --output $(@D) --resume \
		--data benchmarks/results/drafts/continuations.jsonl --own-prompts 320 --reviews 160 --max-new-tokens 128

bench:           ## every operation and method beside its peers, on this machine
	$(MAKE) install EXTRAS=test,bench,peers
	$(MAKE) drafts
	for file in benchmarks/bench_*.py; do PYTHONSAFEPATH=1 $(BIN)/python $$file || exit 1; done

lint: $(STAMP)   ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy

wheel: $(STAMP)  ## build the wheel and import it from an empty directory, in a fresh environment
	rm -rf dist build
	$(BIN)/python -m pip wheel -q --no-deps -w dist .
	rm -rf $(VENV)-wheel && $(PYTHON) -m venv --system-site-packages $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install -q --no-deps dist/posttrain-*.whl
	echo "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')" > $$($(VENV)-wheel/bin/python -c 'import site; print(site.getsitepackages()[0])')/dependencies.pth
	cd $$(mktemp -d) && $(abspath $(VENV)-wheel)/bin/python -c "import posttrain, posttrain.kernels, posttrain.reference; assert '$(VENV)-wheel' in posttrain.__file__, posttrain.__file__"
	cd $$(mktemp -d) && $(abspath $(VENV)-wheel)/bin/posttrain doctor

clean:           ## remove the environments and what was built
	rm -rf $(VENV) $(VENV)-wheel build dist *.egg-info posttrain.egg-info kernels/cpu/*.so benchmarks/results
