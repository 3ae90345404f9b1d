# Each target sets up what it needs from a bare checkout (tools/setup.sh) and can be run again.
# TORCH=torch==2.12.0 make test   another torch for a fresh environment

.PHONY: help demo test build bench docs lint format clean

help:
	@echo "make demo    train two small transformers, remove tokens, shorten spans, factor and route layers, compare, export"
	@echo "make test    build everything and run the whole test suite"
	@echo "make build   build the package into the environment in use, or into .venv"
	@echo "make bench   measure torchops against its rivals (FAMILY=tokens)"
	@echo "make docs    build the site into build/site (ARGS=--outside checks links to other sites)"
	@echo "make lint    formatting, lint and types"
	@echo "make format  bring all files into format"
	@echo "make clean   remove what was built (not .venv)"

demo:
	@PY=$$(tools/setup.sh examples) && $$PY -m examples.demo $(ARGS)

# Two processes share the tests. Threads that wait for the next loop sleep, for those of the other process to run.
test:
	@PY=$$(tools/setup.sh test) && OMP_WAIT_POLICY=PASSIVE $$PY -m pytest -n 2 $(ARGS)

build:
	@tools/setup.sh build

FAMILY ?= tokens
bench:
	@PY=$$(tools/setup.sh bench) && $$PY -m torchops bench $(FAMILY) $(ARGS)

docs:
	@PY=$$(tools/setup.sh docs) && tools/docs.sh $$PY $(ARGS)

lint:
	@PY=$$(tools/setup.sh lint) && tools/lint.sh $$PY check

format:
	@PY=$$(tools/setup.sh lint) && tools/lint.sh $$PY fix

clean:
	rm -rf build dist torchops.egg-info torchops/lib torchops/include torchops/share torchops/_build.py torchops/_C.*.so
