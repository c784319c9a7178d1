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
# What `make cases` runs: the folder, names of cases (* and ?), so many at once, versions of Python.
CASES ?= ../shared/cases
CASE ?= *
JOBS ?= 1
VERSIONS ?=

# Or every interpreter that a test starts compiles hangwatch anew, and twelve of pytest the tests.
unexport PYTHONDONTWRITEBYTECODE

comma := ,
VENV := .venv
CHECK := .venv-check
INTEROP := .venv-interop
FUZZ := .venv-fuzz
BUILT_OF := pyproject.toml $(wildcard setup.py src/hangwatch/worker/_core.c)

.PHONY: help demo test test-all sanitized cases check model interop conformance-table zoo bench \
	bench-handover fuzz soak stress-kills clean

help:
	@echo "make demo       watch four workers until one hangs"
	@echo "make test       run the tests: two minutes"
	@echo "make test-all   run what that leaves out: half an hour; SHORT=1: as CI does"
	@echo "make sanitized  run the tests of a block as AddressSanitizer and UBSan see the core in C"
	@echo "make cases      run the programs of CASES=../shared/cases on Python 3.11, 3.12 and 3.13"
	@echo "make check      ruff, mypy, which room imports which, and code that is there twice"
	@echo "make model      check the protocol's model with Spin (needs spin and gcc)"
	@echo "make interop    what needs torch 2.13.0: a torchrun job that hangs and goes on, and"
	@echo "                that PyTorch still breaks what tests/conformance shows"
	@echo "make conformance-table         run tests/conformance, write the table in docs/"
	@echo "make zoo N=20   meet every program of the hang zoo N times, print the lateness"
	@echo "make bench      what a block costs, in every pattern, beside what others offer"
	@echo "make bench-handover            how long nobody watches after the watcher's death"
	@echo "make fuzz SECONDS=30           what strangers may send, made up at random; SEED=N: once more"
	@echo "make soak SECONDS=600 SEED=7   real workers under real faults, and a proof of what happened"
	@echo "make stress-kills KILLS=10000  kill so many workers of the Local pair while others arm"

# A machine without Python, or with an older one, gets one clear sentence.
define python_is_usable
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "hangwatch needs Python 3.11 or newer: name one with 'make $(MAKECMDGOALS) PYTHON=/path/to/python3.11'." >&2; exit 1; }
endef

define environment
	$(python_is_usable)
	@$(PYTHON) scripts/environment.py $(1) $(2)
	@touch $@
endef

$(VENV)/ready: $(BUILT_OF)
	$(call environment,$(VENV),--editable '.[test]')

$(CHECK)/ready: $(BUILT_OF)
	$(call environment,$(CHECK),--editable '.[test$(comma)check]')

$(FUZZ)/ready: $(BUILT_OF)
	$(call environment,$(FUZZ),--editable '.[test$(comma)fuzz]')

$(INTEROP)/ready: $(BUILT_OF)
	$(call environment,$(INTEROP),$(TORCH_INDEX) torch==2.13.0 numpy)
	$(call environment,$(INTEROP),--editable '.[test]' scikit-learn)

demo: $(VENV)/ready
	@$(VENV)/bin/hangwatch demo

test: $(VENV)/ready
	@echo "running the tests: real processes, two minutes on two cores ..."
	@$(VENV)/bin/python -m pytest -m "not long and not interop"
	@echo "and those of a block once more, over the core in Python ..."
	@HANGWATCH_PURE=1 $(VENV)/bin/python -m pytest -n 4 -m "core and not long"

# Sizes: those of CI if SHORT is set, else the full ones.
test-all: $(VENV)/ready
	@echo "running what make test leaves out ..."
	@$(VENV)/bin/python -m pytest -m "long and not interop" $(if $(SHORT),,--full)
	@$(if $(SHORT),,HANGWATCH_PURE=1 $(VENV)/bin/python -m pytest -n 4 -m "core and long" --full)
	@$(MAKE) --no-print-directory sanitized
	@$(MAKE) --no-print-directory zoo N=$(if $(SHORT),1,20)
	@$(MAKE) --no-print-directory soak SECONDS=$(if $(SHORT),60,600)
	@$(MAKE) --no-print-directory fuzz SECONDS=$(if $(SHORT),30,120)
	@$(MAKE) --no-print-directory stress-kills KILLS=$(if $(SHORT),2000,10000)
	@echo "make test-all: all of it passed"

# AddressSanitizer and UBSan; not what measures memory, of which they keep a lot.
sanitized: $(VENV)/ready
	@$(VENV)/bin/python scripts/sanitized.py -n 4 -m "core and not long" -k "not memory"

# Small programs beside the project that show faults, each judging itself.
cases: $(VENV)/ready
	@PYTHONPATH=tests $(VENV)/bin/python -m cases $(CASES) '$(CASE)' -j $(JOBS) \
		$(if $(VERSIONS),--python $(VERSIONS))

check: $(CHECK)/ready
	$(CHECK)/bin/ruff check .
	$(CHECK)/bin/ruff format --check .
	$(CHECK)/bin/mypy
	$(CHECK)/bin/lint-imports --no-cache
	$(CHECK)/bin/pylint src/hangwatch tests benchmarks examples

model:
	$(python_is_usable)
	$(PYTHON) tests/model/check.py

interop: $(INTEROP)/ready
	$(INTEROP)/bin/python -m pytest -m interop -n 3 tests/interop
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

# Beside PyTorch's pair, too, once `make interop` has installed it.
bench: $(VENV)/ready
	$(if $(wildcard $(INTEROP)/ready),$(INTEROP),$(VENV))/bin/python benchmarks/blocks.py

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
