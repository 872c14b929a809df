# make demo [RANKS=2] [DEVICE=cpu|cuda] [ENGINE=auto|reference|unfused|fused] [BACKEND=auto]   the main job; make test; make check-kernels
# On a CPU machine each target makes its own virtual environment. With DEVICE=cuda the machine's own python3 is used as it is.
RANKS   ?= 2
DEVICE  ?= cpu
ENGINE  ?= auto
BACKEND ?= auto
VENV    ?= .venv

# Ranks share the cores; threads of one rank that spin on another's core cost more than they compute.
export OMP_NUM_THREADS ?= 1
# Multicast objects are never used, and their creation must never be attempted.
export TORCH_SYMM_MEM_DISABLE_MULTICAST = 1
export NCCL_NVLS_ENABLE = 0
export NVSHMEM_DISABLE_NVLS = 1

ifeq ($(DEVICE),cuda)
PYTHON := python3
READY  :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/.ready
endif

.PHONY: demo test check-kernels clean

demo: $(READY)
	$(PYTHON) -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node $(RANKS) \
	    launch/demo.py --device $(DEVICE) --engine $(ENGINE) --backend $(BACKEND)

test: $(READY)
	$(PYTHON) -m pytest tests

check-kernels: $(READY)
	$(PYTHON) -m megamoe.kernels.check

# torch first and pinned: an unpinned torch brings several gigabytes of CUDA packages that a CPU machine has no use for.
$(VENV)/.ready: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,transformers]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
