# make reproduce | study | readme | shown (video, presentation, book) | test | test-browser | rehearsal | versions | lab |
# notebooks | setup. Needs Python >= 3.11 and make; everything goes into .venv and results/.
PYTHON ?= python3
BIN := .venv/bin
TEST_RESULTS := .cache/test-results

NOTEBOOKS := $(wildcard notebooks/*.ipynb)

# Jupyter's tools look here for kernels first: another environment's may have the same name.
export JUPYTER_PATH := $(CURDIR)/.venv/share/jupyter

.PHONY: setup reproduce study readme shown video presentation book test test-browser rehearsal versions lab notebooks

setup: .venv/installed

reproduce: setup
	$(BIN)/clipseg-repro reproduce --resume

# Trains and measures what the tables still lack, and writes them; stops and goes on. Hours: results/measured holds what
# is done.
study: setup
	$(BIN)/clipseg-repro study
	$(BIN)/clipseg-repro reproduce

# The README's front page, results/ro-crate-metadata.json, and the report (its PDF where a Chromium is installed).
readme: setup
	$(BIN)/python -m clipseg_repro.study.front_page README.md
	$(BIN)/python presentation/report.py

# All that is shown to others.
shown: video readme presentation book

# The demo film with its poster and captions, results/demo.*: drawn, computed and timed anew, two minutes.
video: setup
	$(BIN)/python presentation/video.py

# Slides and, where LibreOffice is installed, their PDF, from results/: see presentation/README.md.
presentation: setup
	$(BIN)/python presentation/slides.py

# The study as a web page, presentation/book/_build/html; Sphinx, which makes it, is needed only here.
book: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .[book]
	$(BIN)/python presentation/book/build.py

# Notebooks write results when nbval runs them: here into a copy, so that tests change no tracked file.
test: setup
	$(BIN)/ruff check .
	$(BIN)/clipseg-repro data build
	rm -rf $(TEST_RESULTS) && mkdir -p results $(dir $(TEST_RESULTS)) && cp -R results $(TEST_RESULTS)
	CLIPSEG_REPRO_RESULTS="$(CURDIR)/$(TEST_RESULTS)" $(BIN)/python -m pytest --nbval

# Notebook 13 in JupyterLab, driven in a Chromium; says how to get one. Playwright, which drives it, is needed only here.
test-browser: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .[browser]
	$(BIN)/clipseg-repro data build
	$(BIN)/python -m pytest tests/browser.py

# The paper scale from end to end, against stand-ins (see the file).
rehearsal: setup
	$(BIN)/python tests/rehearsal.py

# CLIPSeg's logits under old and new transformers, which it downloads (see the file).
versions: setup
	$(BIN)/python tests/versions.py

lab: setup
	$(BIN)/clipseg-repro data build
	$(BIN)/jupyter lab notebooks

# After a change of weights or package: store the outputs that the tests hold the notebooks to. No progress bars: stored
# widgets show nothing without a kernel. (In notebooks tqdm heeds no TQDM_DISABLE, but it waits a day before it draws.)
notebooks: setup
	TQDM_DELAY=86400 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False \
	  --ExecutePreprocessor.timeout=1200 $(NOTEBOOKS)

.venv/installed: .venv/requirements pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

.venv/requirements: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' is `$(PYTHON) --version 2>&1`." \
	       "Name a newer one: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@
