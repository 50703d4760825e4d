# Tailor: `make demo` shows the whole way, `make test` proves it. `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Threads that wait sleep: by default they spin, and two processes on two cores then take several times as long.
export OMP_WAIT_POLICY := passive
# Compiled modules are kept: DVC's stages, Triton's stubs and the tests are hundreds of Python processes.
unexport PYTHONDONTWRITEBYTECODE
# No tool that Tailor uses reports home.
export ORT_DISABLE_TELEMETRY := 1
export DVC_NO_ANALYTICS := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1

# The local Triton server embeds Python and needs numpy below 2, so the demo wants 3.11 or 3.12.
# Override with: make demo PYTHON=/path/to/python3.12
PYTHON ?= $(shell for name in python3 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo "$$name"; break; }; done)

.PHONY: help
help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

.PHONY: install
install: not-moved $(VENV)/installed ## set up .venv from the exact versions and hashes of requirements/development.txt

# The programs of a virtual environment start with the absolute path of its Python.
.PHONY: not-moved
not-moved:
	@[ -f $(VENV)/bin/pip ] || exit 0; \
	made=$$(sed -nE '1,2s|.*[!"](/[^"]*)/python[0-9.]*.*|\1|p' $(VENV)/bin/pip | head -n 1); \
	[ "$$made" -ef $(VENV)/bin ] || { echo "make: $(VENV) was made as $${made%/bin} and works only there;" \
		"run \`make clean\`, then \`make install\`" >&2; exit 2; }

# The lock lists all dependencies, so pip resolves nothing.
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps

$(VENV)/installed: requirements/development.txt pyproject.toml setup.py
	@if [ -z "$(PYTHON)" ]; then echo "make: no Python 3.11 or 3.12 found; install one or pass PYTHON=/path/to/python3.12" >&2; exit 2; fi
	@[ -x $(VENV)/bin/python ] || "$(PYTHON)" -m venv $(VENV) || \
		{ echo "make: $(PYTHON) cannot make a virtual environment; install its venv package (python3-venv)" >&2; exit 2; }
	@echo "installing into $(VENV) (torch brings about 5 GB; a few minutes)"
	@$(PIP) --require-hashes -r $<
	@$(PIP) --no-build-isolation -e .
	@touch $@

DEMO := build/demo

.PHONY: demo
demo: install ## train, evaluate, export and serve the embedded data in a project of its own, build/demo
	@[ -f $(DEMO)/params.yaml ] || python -m pipeline.commands new $(DEMO) > /dev/null
	@cd $(DEMO) && export PYTHONPATH="$(CURDIR)" && dvc repro && python -m pipeline.demo.baseline && python -m pipeline.commands demo

PHOTOS := build/demo-photos

.PHONY: demo-photos
demo-photos: install ## the same on your photographs, with a pretrained encoder: make demo-photos FOLDER=photos (a folder per class)
	@[ -d "$(FOLDER)" ] || { echo "make: FOLDER is '$(FOLDER)'; expected a folder that holds a folder of images for each class," \
		"for example: make demo-photos FOLDER=photos" >&2; exit 2; }
	@[ -f $(PHOTOS)/params.yaml ] || python -m pipeline.commands new $(PHOTOS) > /dev/null
	@folder=$$(realpath "$(FOLDER)") && cd $(PHOTOS) && export PYTHONPATH="$(CURDIR)" && \
		python -m pipeline.commands init "$$folder" --force && dvc repro && \
		python -m pipeline.demo.baseline && python -m pipeline.commands demo

.PHONY: retrain-demo
retrain-demo: install ## two rounds of retraining on the embedded data: one promoted, one refused
	@python -m pipeline.demo.retraining

.PHONY: test
test: install lint ## style, types and every test but those of test-faults and test-docs
	@python -m pytest -n 2 --dist loadgroup -m "not faults and not docs_commands"

.PHONY: test-faults
test-faults: install ## retraining and schedules killed and stopped over and over; many minutes
	@python -m pytest -m faults

.PHONY: test-docs
test-docs: install ## every command of the docs, those that take minutes too
	@python -m pytest tests/end_to_end/documentation

.PHONY: test-fast
test-fast: install lint ## the layer without DVC, Triton, training, browsers; under a minute
	@OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadgroup -m "not end_to_end and not slow"

.PHONY: test-random
test-random: install ## as `test`, in random order; SEED=1 for one order, WORKERS=2 for two processes
	@python -m pytest -p randomly --randomly-seed=$(or $(SEED),default) --randomly-dont-reset-seed \
		-n $(or $(WORKERS),0) --dist loadgroup -m "not faults and not docs_commands" $(TESTS)

.PHONY: lint
lint: install ## style, types of the public parts, import contracts
	@ruff check --quiet .
	@ruff format --check --quiet .
	@lint-imports --no-cache --no-logo
	@mypy --no-error-summary

.PHONY: docs
docs: install ## the documentation as a site in build/site/
	@python docs/reference/generated.py && zensical build --strict --clean
	@echo "build/site/index.html"

.PHONY: pages
pages: install ## write docs/architecture.md and what else is generated from the source
	@python docs/reference/pages.py

.PHONY: audit
audit: install ## licences and public advisories of the locked packages, secrets in the repository
	@python .ci/audit.py
	@pre-commit run secrets --all-files

.PHONY: sbom
sbom: install ## the Python packages of each image as CycloneDX, in build/sbom/
	@PYTHONPATH=. python .ci/sbom.py

.PHONY: hooks
hooks: install ## check style, types and secrets before every commit
	@pre-commit install

.PHONY: serve
serve: install ## serve what was promoted, else the exported student, until Ctrl-C
	@tailor serve

LOCK := uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-package pip \
	--constraint requirements/bounds.in --custom-compile-command "make lock"
# The other locks hold some packages of the first, in the same versions.
PART := $(LOCK) --constraint requirements/development.txt
extras = $(addprefix --extra ,$(1))

.PHONY: lock
lock: install ## resolve newer exact versions, with hashes, into requirements/*.txt
	@$(LOCK) pyproject.toml $(call extras,pipeline s3 gcs export cpu serve loadtest monitor playground text mlflow ray) \
		--group docs --group test --group supply -o requirements/development.txt
	@$(PART) pyproject.toml $(call extras,pipeline export cpu) -o requirements/train.txt
	@echo setuptools | $(PART) pyproject.toml - $(call extras,serve cpu) -o requirements/server.txt
	@$(PART) pyproject.toml -o requirements/gateway.txt
	@printf 'pillow\npyarrow\n' | $(PART) - -o requirements/container.txt
	@echo onnxruntime-gpu | $(LOCK) --no-deps - -o requirements/gpu.txt

.PHONY: clean
clean: ## remove .venv; data, artifacts and DVC's cache stay
	@rm -rf $(VENV) *.egg-info
