# make demo  - install, draw the synthetic data set, train, evaluate, write the retrieval page
# make test  - install, lint, all tests
# make test-fast - the quick tests, for the inner loop
# make docs  - the site, into build/site
# make wheel - build a wheel, install it into an empty environment, use it there
# make test-kill - kill a run KILLS times, and hold it against one that was not
# make test-fuzz - feed the readers damaged files for FUZZ_SECONDS
# Variables: PYTHON (interpreter), VENV (environment), EXTRA (cuda12 or cuda13: JAX with CUDA), WORKDIR (demo's folder),
#   JAX (another one than requirements.lock has, for a new VENV: 'jax==0.11.*', or 'jax', the newest)

PYTHON ?= python3
VENV ?= .venv
EXTRA ?=
JAX ?=
WORKDIR ?= runs/demo
PYTEST_ARGS ?= -n 2 --dist loadgroup
KILLS ?= 50
FUZZ_SECONDS ?= 600

BIN := $(VENV)/bin
# What finds most slips in little time: no process is started, and one network trained.
FAST := $(addprefix tests/,test_architecture.py test_repository.py test_settings.py test_losses.py test_optim.py \
	test_nonfinite.py test_lost_process.py test_step.py::test_four_steps_train test_docs.py::test_links_lead_somewhere \
	test_docs.py::test_commands_can_be_right test_docs.py::test_names_in_the_text_exist data/test_sampling.py \
	data/test_decode.py datasets/test_own.py datasets/test_mat_file.py datasets/test_regdb.py datasets/test_llcm.py \
	datasets/test_sysu_mm01.py evaluation/test_metrics.py evaluation/test_protocols.py evaluation/test_bootstrap.py \
	evaluation/test_rerank.py evaluation/test_top_k.py models/test_layers.py methods/test_mpanet.py)

INSTALLED := $(VENV)/.installed$(if $(EXTRA),-$(EXTRA))
REPORT_INSTALLED := $(VENV)/.installed-report
TEST_INSTALLED := $(VENV)/.installed-test

.PHONY: demo test test-fast docs wheel test-kill test-fuzz lint format lock clean

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

test-fast: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -q -n 2 $(FAST)

# The variable: a notice of mkdocs-material about another program.
docs: $(TEST_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Every module is imported there: none of the files, and none of the dependencies, is missing from the wheel.
wheel:
	rm -rf build/lib build/wheel
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	build/wheel/env/bin/python -m pip install --quiet -c requirements.lock build/wheel/*.whl
	build/wheel/env/bin/python -m pip check
	cd build/wheel && env/bin/python -c "import importlib, pkgutil, mpanet_jax; \
		print(len([importlib.import_module(m.name) for m in pkgutil.walk_packages(mpanet_jax.__path__, 'mpanet_jax.')]), \
		'modules imported from', mpanet_jax.__path__[0])"

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
	$(if $(JAX),$(BIN)/python -m pip install --quiet --upgrade "$(JAX)")
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
