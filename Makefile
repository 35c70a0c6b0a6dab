# make demo   install, then the main job: deployments/demo.yaml into outputs/demo
# make test   install, then every check
# make clean  remove the installation and caches; outputs/ and store/ stay
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
PIP = .venv/bin/python -m pip install -c constraints.txt

.PHONY: demo test clean

demo: .venv/.installed
	.venv/bin/lors run deployments/demo.yaml

# three processes of one thread each: one of them always waits for a program to start, and more threads than cores would
# wait for one another; bytecode is kept, since a hundred programs start
test: export PYTHONDONTWRITEBYTECODE =
test: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder

# torch by itself and first, so that nothing else decides which of its builds is taken
.venv/.installed: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error Python 3.11, 3.12 or 3.13 was not found; install one, or name it: make PYTHON=/path/to/python))
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist lors.egg-info
	find lors tasks flows tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
