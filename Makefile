# Every target sets up what it needs, in virtual environments beside this file.
PYTHON ?= python3
# pip options that choose where torch comes from, for example
# TORCH_INDEX='--index-url URL'
TORCH_INDEX ?=
# How often `make zoo` meets each program.
N ?= 1
# How many seconds `make soak` takes, and `make fuzz` with each target; SEED=0: another each time.
SECONDS ?= 30
SEED ?= 0
# How many workers `make stress-kills` kills; SEED is that of its dice.
KILLS ?= 10000

comma := ,
VENV := .venv
CHECK := .venv-check
INTEROP := .venv-interop
FUZZ := .venv-fuzz

.PHONY: help demo test check model interop conformance-table zoo bench-arm \
	bench-handover fuzz soak stress-kills clean

help:
	@echo "make demo       watch four workers until one hangs"
	@echo "make test       run the tests (no torch)"
	@echo "make check      ruff and mypy"
	@echo "make model      check the protocol's model with Spin (needs spin and gcc)"
	@echo "make interop    what needs torch 2.13.0: a torchrun job that hangs and goes on, and"
	@echo "                that PyTorch still breaks what tests/conformance shows"
	@echo "make conformance-table         run tests/conformance, write the table in docs/"
	@echo "make zoo N=20   meet every program of the hang zoo N times, print the lateness"
	@echo "make bench-arm  what a block costs"
	@echo "make bench-handover            how long nobody watches after the watcher's death"
	@echo "make fuzz SECONDS=30           what strangers may send, made up at random; SEED=N: once more"
	@echo "make soak SECONDS=600 SEED=7   real workers under real faults, and a proof of what happened"
	@echo "make stress-kills KILLS=10000  kill so many workers of the Local pair while others arm"

# A machine without the venv module, or with an older Python, gets one clear sentence.
define python_is_usable
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "hangwatch needs Python 3.11 or newer: name one with 'make $(MAKECMDGOALS) PYTHON=/path/to/python3.11'." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "$(PYTHON) has no venv module: install it (Debian: apt-get install python3-venv) and try again." >&2; exit 1; }
endef

define environment
	$(python_is_usable)
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@echo "installing into $(1) ..."
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2)
	@touch $@
endef

$(VENV)/ready: pyproject.toml
	$(call environment,$(VENV),--editable '.[test]')

$(CHECK)/ready: pyproject.toml
	$(call environment,$(CHECK),--editable '.[test$(comma)check]')

$(FUZZ)/ready: pyproject.toml
	$(call environment,$(FUZZ),--editable '.[test$(comma)fuzz]')

$(INTEROP)/ready: pyproject.toml
	$(call environment,$(INTEROP),$(TORCH_INDEX) torch==2.13.0 numpy)
	@$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' scikit-learn

demo: $(VENV)/ready
	$(VENV)/bin/hangwatch demo

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m "not interop"

check: $(CHECK)/ready
	$(CHECK)/bin/ruff check .
	$(CHECK)/bin/ruff format --check .
	$(CHECK)/bin/mypy

model:
	$(python_is_usable)
	$(PYTHON) tests/model/check.py

interop: $(INTEROP)/ready
	$(INTEROP)/bin/python -m pytest -m interop -n 0 tests/interop
	$(CONFORMANCE) -m interop
	PYTHONPATH=tests $(INTEROP)/bin/python -m stress.kill_storm 300 --seed $(SEED) --show \
		--implementation torch.distributed.elastic.timer

# Most of the time its processes wait: eight at once are not too many for two cores.
CONFORMANCE = $(INTEROP)/bin/python -m pytest -n 8 tests/conformance/test_conformance.py

conformance-table: $(INTEROP)/ready
	@rm -rf build/conformance
	HANGWATCH_CONFORMANCE_RESULTS=$(CURDIR)/build/conformance $(CONFORMANCE)
	PYTHONPATH=tests $(INTEROP)/bin/python -m conformance.table build/conformance docs/migrating-from-torch.md

zoo: $(VENV)/ready
	PYTHONPATH=tests $(VENV)/bin/python -m zoo $(N)

bench-arm: $(VENV)/ready
	$(VENV)/bin/python benchmarks/arm.py

bench-handover: $(VENV)/ready
	$(VENV)/bin/python benchmarks/handover.py

fuzz: $(FUZZ)/ready
	PYTHONPATH=tests $(FUZZ)/bin/python -m fuzz $(SECONDS) --seed $(SEED)

soak: $(VENV)/ready
	PYTHONPATH=tests $(VENV)/bin/python -m soak $(SECONDS) $(SEED)

stress-kills: $(VENV)/ready
	PYTHONPATH=tests $(VENV)/bin/python -m stress.kill_storm $(KILLS) --seed $(SEED)

clean:
	rm -rf $(VENV) $(CHECK) $(INTEROP) $(FUZZ) dist build
