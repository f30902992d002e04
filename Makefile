# `make demo` and `make test` install what is missing first. docker/setup.sh describes what and why.
# PYTHON=/path/to/python3.12 selects the Python.
setup := bash docker/setup.sh
python := .venv/bin/python

.PHONY: help demo test test-lowest test-slurm test-reliability test-full gpu-kit lint docs docs-serve pictures env ffcv requirements clean
.DEFAULT_GOAL := help

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | while IFS='|' read -r target text; do printf '%-20s %s\n' "$$target" "$$text"; done

demo: env  ## pretrain on real digits, evaluate, write the report
	@$(python) launch/demo.py

test: env  ## run the test suite, two tests at a time
	@$(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-lowest: .venv-lowest/.installed  ## test the promises with the lowest declared versions, on Python 3.12
	@.venv-lowest/bin/python -m pytest -n 2 --dist loadfile -m "promise and not full and not slurm"

test-slurm: env  ## test a preempted run on a real SLURM of two nodes on this machine; installs SLURM as root
	@bash tests/slurm/cluster.sh install
	@$(python) -m pytest tests/slurm -m "slurm and not full"

test-reliability: env  ## test every fault case, also on a real SLURM, in about 15 minutes; writes the table of docs/reliability.md
	@bash tests/slurm/cluster.sh install
	@$(python) -m pytest tests/slurm tests -m case -n 2 --dist loadfile --no-loadscope-reorder --table=docs/reliability.md

test-full: env  ## run all of these and the long tests, marked `full`; writes the table too
	@bash tests/slurm/cluster.sh install
	@$(python) -m pytest tests/slurm tests -m "full or not full" -n 2 --dist loadfile --no-loadscope-reorder --table=docs/reliability.md

gpu-kit: env  ## pack what a GPU machine without a network needs into .gpu-kit, and print the calls
	@$(python) tests/gpu/kit.py

lint: env  ## check style, format, types and the layers of imports
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy
	@.venv/bin/lint-imports

docs: env  ## build the docs site into site/, where any warning is an error
	@NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict
	@echo "Open site/index.html in a browser."

docs-serve: env  ## show the docs site while you write it
	@NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs serve

pictures: env  ## make every picture of README and docs again, from the runs in runs/; prints which runs are missing
	@PYTHONPATH=.:tests/eval $(python) tests/docs/pictures.py

env: .venv/.package  ## install what is missing
	@:

ffcv: .venv/.python  ## build FFCV, an optional decoder; needs a compiler and system libraries
	@$(setup) ffcv

requirements: .venv/.python  ## pin docker/requirements*.txt again from pyproject.toml; UPGRADE=--upgrade takes newer versions
	@$(setup) pin $(UPGRADE)

clean:  ## remove both environments and all caches of this folder, but not runs/
	rm -rf site .venv .venv-lowest .pytest_cache .mypy_cache .ruff_cache build ssl_pretrain.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.python: docker/setup.sh docker/requirements.txt docker/requirements-uv.txt
	@$(setup) python
	@touch $@

.venv/.package: pyproject.toml .venv/.python
	@$(setup) package
	@touch $@

.venv-lowest/.installed: docker/requirements-lowest.txt pyproject.toml .venv/.python
	@$(setup) lowest
	@touch $@

