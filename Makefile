# Every target sets up what it needs in .venv first. PYTHON chooses another interpreter (3.12 or newer).
PYTHON ?= $(shell command -v python3.12 || command -v python3)
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu
export TPU_SKIP_MDS_QUERY ?= 1

.PHONY: setup quickstart test test-slow check format hooks benchmark clean

setup: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"mamba-jax needs Python 3.12 or newer, {sys.executable} is {sys.version.split()[0]}: make PYTHON=/path/to/python3.12" if sys.version_info < (3, 12) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch .venv/.ready

quickstart: setup
	$(BIN)/python train.py configs/quickstart.py
	$(BIN)/python eval.py runs/quickstart --max-batches 16 --prompt "My fellow citizens, "
	rm -rf runs/quickstart/export
	$(BIN)/python -m mamba_jax.export runs/quickstart runs/quickstart/export --layout hf
	@echo
	@echo "Your model is in runs/quickstart: loss_curve.png, samples.txt, metrics.jsonl, and export/ for transformers."
	@echo "Next: change configs/quickstart.py or override a field, for example"
	@echo "    $(BIN)/python train.py configs/quickstart.py --model.num-layers 6 --train.run-dir runs/deeper"
	@echo "    $(BIN)/python eval.py runs/quickstart --prompt \"The state of the union is\" --sampling.temperature 0.7"

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# From now on `git commit` runs what `make check` runs, by .pre-commit-config.yaml or, without pre-commit, by a script.
hooks: setup
	if command -v pre-commit > /dev/null; then pre-commit install; \
	else printf '#!/bin/sh\nexec make check\n' > "$$(git rev-parse --git-path hooks)/pre-commit" && \
	chmod +x "$$(git rev-parse --git-path hooks)/pre-commit"; fi

benchmark: setup
	$(BIN)/python benchmarks/run_ops.py
	$(BIN)/python benchmarks/run_training.py

clean:
	rm -rf .venv build *.egg-info
