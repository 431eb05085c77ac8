# Needs GNU make and Python 3.11 or newer; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A CPU-only build of torch spares gigabytes of CUDA packages; see README, "Install".
PIP_FLAGS ?=

.PHONY: demo test lint compare fuzz bench clean

demo: $(VENV)/installed
	$(BIN)/moesim demo --out runs/demo

test: $(VENV)/installed-dev lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/installed-dev .shim/moesim
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Simulated beside measured on two CPU ranks, calibrated on the spot; for looking at, nothing depends on the numbers.
COMPARED := runs/compare
SAME := --policy balanced,predictive-batch --batch-tokens 512 --max-steps 8
compare: $(VENV)/installed
	$(BIN)/moesim record --model models/switch-mini --text models/switch-mini/samples --max-tokens 10000 \
		--out $(COMPARED)/trace.moetrace --force
	$(BIN)/moesim calibrate models/switch-mini --ranks 2 --device cpu --batch-tokens 512 --out $(COMPARED)/profile.json
	$(BIN)/moesim simulate $(COMPARED)/trace.moetrace $(SAME) --profile $(COMPARED)/profile.json --gpus 2 \
		--out $(COMPARED)/simulated.json
	$(BIN)/moesim run-gpu models/switch-mini --trace $(COMPARED)/trace.moetrace $(SAME) --ranks 2 --device cpu \
		--out $(COMPARED)/measured.json
	$(BIN)/moesim compare $(COMPARED)/simulated.json $(COMPARED)/measured.json

# Damaged and random recordings, many of them; `make test` tries a few.
FUZZ_EXAMPLES ?= 2000
fuzz: $(VENV)/installed-dev
	MOESIM_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q -n 2 tests/traces/test_fuzz.py

bench: $(VENV)/installed
	$(BIN)/python benchmarks/recorder_overhead.py
	$(BIN)/python benchmarks/planner.py

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[dev]"
	touch $@

# mypy does not follow the import hook of an editable install; a link named like the package does.
.shim/moesim:
	mkdir -p .shim
	ln -sfn .. $@

clean:
	rm -rf $(VENV) .shim build dist *.egg-info runs
