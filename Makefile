# Two commands, each complete on a machine with Python 3.11 (or later) and git:
#   make demo    data, a small ablation, its table and figure
#   make test    everything that is checked before a change lands
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo mini test test-cluster chaos check docs format clean

demo: $(STAMP)
	@$(BIN)/mar data make motion-verbs mar_data/motion-verbs
	@$(BIN)/mar run search_spaces/quickstart.yaml

# Every study of the paper at a small size, for real: data, pre-training, some 200 trainings, pages (docs/mini). Hours;
# stop it when you like, the same command resumes.
MINI_VIDEOS := $(BIN)/mar data make motion-verbs --size 36 --classes 8
MINI_WEIGHTS := verbs_vit_b other_vit_b other_vit_l pictures_vit_b small_a_vit_b small_b_vit_b

mini: $(STAMP)
	$(MINI_VIDEOS) mar_data/mini/verbs --train 4096 --validation 2048
	$(MINI_VIDEOS) mar_data/mini/other --seed 1 --shake 0.01 --frames 24 --train 4096 --validation 2048
	$(MINI_VIDEOS) mar_data/mini/pictures --seed 2 --frames 2 --motion 0 --train 4096 --validation 64
	$(MINI_VIDEOS) mar_data/mini/small_a --seed 3 --train 512
	$(MINI_VIDEOS) mar_data/mini/small_b --seed 4 --clutter 1 --shake 0.01 --train 256
	$(BIN)/mar run mini_pretraining
	for name in $(MINI_WEIGHTS); do \
	  $(BIN)/mar weights convert search_spaces/recipes/mini/pretrain/$$name.yaml mar_data/mini/weights/$$name || exit; \
	done
	$(BIN)/mar run --all recipe=mini
	$(BIN)/mar report --all recipe=mini
	$(BIN)/python benchmarks/mini_pages.py mar_store docs/mini

test: check
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# More of Ray clusters of several nodes, and servers that are killed: ten minutes on a machine that must have no other Ray.
test-cluster: $(STAMP)
	$(BIN)/pytest -q -m cluster

# Studies under random faults for an hour, with seeds: every kind of fault, on every backend; docs/faults.md has its table.
chaos: $(STAMP)
	$(BIN)/python tests/chaos.py --minutes 60

# The site, in build/site: the reference's pages are written from the code first. A warning, as of a dead link, is an error.
docs: $(STAMP)
	$(BIN)/python benchmarks/reference_pages.py docs/reference
	$(BIN)/zensical build --strict --clean

check: $(STAMP) docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Installed again when what is to be installed has changed; by uv where it is installed, by pip otherwise.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mar needs Python 3.11 or later: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	if command -v uv >/dev/null; then \
	  uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	fi
	@touch $(STAMP)

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .import_linter_cache
