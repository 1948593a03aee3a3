# Every target sets up .venv by itself; nothing is reinstalled while the requirements are unchanged.
PYTHON ?= python3

# README's first table.
quickstart: .venv/runtime
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash runs/quickstart.sh

test: .venv/dev
	.venv/bin/python -m pytest

# Kills, full disks, damaged files; Linux, ten minutes on two cores.
torture: .venv/dev
	.venv/bin/python -m pytest -m "slow or not slow" tests/torture

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# The table of docs/costs.md; after `make quickstart`, whose AT classifier it attacks.
bench: .venv/runtime
	.venv/bin/python -m benchmarks

# The acceptance run on one GPU, nine minutes.
gpu: .venv/runtime
	.venv/bin/python -m benchmarks.gpu

# The runs of docs/results.md. Begins without results: runs of another machine cannot stand beside this one's.
# digits_table comes first: no table of docs/results.md is written without it.
EVIDENCE = digits_table digits_contrastive digits_curve digits_ablations digits_imbalance fashion_mnist cifar10_small verdicts
evidence: .venv/runtime
	.venv/bin/python train_at.py --dataset fashion-mnist --data-dir $${FASHION:-/usr/share/datasets/fashion-mnist} --out-dir out/evidence/check-fashion --check
	.venv/bin/python train_at.py --dataset cifar10 --data-dir $${DATA:-data} --model wrn-10-2 --batch-size 64 --out-dir out/evidence/check --check
	rm -f docs/results.json
	for name in $(EVIDENCE); do PATH="$(CURDIR)/.venv/bin:$$PATH" bash runs/$$name.sh || exit; done

# The tables and figures of docs/results.md, README.md and docs/speedrun.md, from what is kept of the runs.
results: .venv/runtime
	.venv/bin/python -m runs.results
	.venv/bin/python -m runs.speedrun

.venv/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; try: make PYTHON=python3.12")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: quickstart test torture lint bench gpu evidence results
