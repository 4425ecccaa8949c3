# make demo  - install, draw the synthetic data set, train, evaluate, write the retrieval page
# make test  - install, lint, all tests
# make test-kill - kill a run KILLS times, and hold it against one that was not
# make test-fuzz - feed the readers damaged files for FUZZ_SECONDS
# Variables: PYTHON (interpreter), VENV (environment), EXTRA (cuda12 or cuda13: JAX with CUDA), WORKDIR (demo's folder)

PYTHON ?= python3
VENV ?= .venv
EXTRA ?=
WORKDIR ?= runs/demo
PYTEST_ARGS ?= -n 2 --dist loadgroup
KILLS ?= 50
FUZZ_SECONDS ?= 600

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed$(if $(EXTRA),-$(EXTRA))
REPORT_INSTALLED := $(VENV)/.installed-report
TEST_INSTALLED := $(VENV)/.installed-test

.PHONY: demo test test-kill test-fuzz lint format lock clean

demo: $(REPORT_INSTALLED) $(WORKDIR)/raw
	$(BIN)/python scripts/train.py --config=configs/synthetic.py --workdir=$(WORKDIR) \
		--config.dataset.source=$(WORKDIR)/raw --config.dataset.data_dir=$(WORKDIR)/data
	@echo "== the network before its first step =="
	$(BIN)/python scripts/evaluate.py --workdir=$(WORKDIR) --checkpoint=untrained
	@echo "== restored from $(WORKDIR)/checkpoints =="
	$(BIN)/python scripts/evaluate.py --workdir=$(WORKDIR)
	@echo "== each query with its first images: open $(WORKDIR)/report.html in a browser =="
	$(BIN)/python scripts/visualize.py retrieval --workdir=$(WORKDIR)

# The folder appears only when it is complete, so it is its own stamp; it is drawn once.
$(WORKDIR)/raw: | $(INSTALLED)
	$(BIN)/python scripts/make_synthetic.py --layout=sysu_mm01 --out=$@

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-kill: $(TEST_INSTALLED)
	folder=$$(mktemp -d) && $(BIN)/python -m tests.kill_matrix $$folder $(KILLS) && rm -rf $$folder

test-fuzz: $(TEST_INSTALLED)
	$(BIN)/python -m tests.fuzz $(FUZZ_SECONDS)

# The variable: pyright asks the network for newer versions of itself otherwise.
lint: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

format: $(TEST_INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp is written last, so an interrupted installation is taken up again. The editable install resolves nothing:
# everything comes from the lock file.
$(INSTALLED): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(if $(EXTRA),$(BIN)/python -m pip install --quiet -c requirements.lock "jax[$(EXTRA)]")
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# The extra `report`, in the versions that are tested.
$(REPORT_INSTALLED): $(INSTALLED) requirements-test.lock
	$(BIN)/python -m pip install --quiet -c requirements-test.lock jinja2 matplotlib scikit-learn
	touch $@

$(TEST_INSTALLED): $(INSTALLED) requirements-test.lock
	$(BIN)/python -m pip install --quiet -r requirements-test.lock
	touch $@

# Pins both files anew; needs uv (pip install uv).
lock:
	uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate --no-header \
		pyproject.toml requirements-build.in -o requirements.lock
	uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate --no-header \
		-c requirements.lock requirements-test.in -o requirements-test.lock
	echo "torch==2.13.0" >> requirements-test.lock

clean:
	rm -rf $(VENV) runs/demo
