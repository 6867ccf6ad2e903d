# Every target only wraps what the README shows as plain pip and snakemake commands.
PYTHON ?= python3
CORES ?= all
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: env study report test test-workflow test-long test-slurm test-faults test-conda test-export test-napari test-wheel docs clean

env: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[em,fast,workflow,dev]"
	touch $@

study: env ## STUDY=nuclei runs another study than the default of config.yaml
	snakemake --cores $(CORES) --quiet rules progress host $(if $(STUDY),--config study=$(STUDY))

report: env
	snakemake --report report.html $(if $(STUDY),--config study=$(STUDY))

# each file is tested by one process, so that nothing is made twice; see FIRST in tests/conftest.py
TEST := pytest -n 2 --dist loadfile --no-loadscope-reorder

test: env
	$(TEST)

# ONLY="name or name" runs a part of these: words in the names of tests
test-workflow: env ## pages done as they say, downloads, a volume that is killed: minutes
	$(TEST) tests/workflow $(if $(ONLY),-k "$(ONLY)")

test-long: env ## peaks of memory, every network in OpenVINO and bfloat16, torch.compile: minutes
	$(TEST) -m long $(if $(ONLY),-k "$(ONLY)")

test-slurm: env ## on the cluster of this machine, or on one that SLURM_LOCAL=program starts; minutes
	pip install --quiet -c constraints.txt -e ".[slurm]"
	pytest -v -rs tests/slurm $(if $(ONLY),-k "$(ONLY)")

test-faults: env ## killed, full disk, damaged files, closed folders, on a real study: minutes
	pytest -v --durations=0 tests/faults $(if $(ONLY),-k "$(ONLY)")

test-conda: env ## the smoke study with --use-conda, where there is a conda command: minutes
	pytest -v -rs tests/conda

test-export: env ## what `gdlib export` writes for other programs, and `gdlib quantise`; installs them; two minutes
	pip install --quiet -c constraints.txt -e ".[export,quantise]"
	pytest -v -rs --durations=0 tests/export $(if $(ONLY),-k "$(ONLY)")

test-napari: env ## the plug-in in a real viewer; without a screen: xvfb-run -a make test-napari
	pip install --quiet -c constraints.txt -e ".[napari]" pyqt6 pytest-qt
	pytest -v -rs tests/napari $(if $(ONLY),-k "$(ONLY)")

test-wheel: env ## a wheel without the project around: minutes; WHEEL_PACKAGES=anew installs all packages anew too
	pip install --quiet -c constraints.txt build
	pytest -v -rs --durations=0 tests/wheel $(if $(ONLY),-k "$(ONLY)")

docs: env ## the pages that are made from the code
	gdlib schema > workflow/schemas/config.schema.json
	gdlib schema --markdown > docs/configuration.md
	gdlib models --markdown > docs/networks.md

clean: ## everything that can be made again, except the environment
	rm -rf data results logs report.html .snakemake
