#!/usr/bin/env bash
# Which recipe reaches a robust accuracy with the fewest passes? Ten seeds of every recipe, attacked
# by APGD-CE+T. The last command writes the tables of docs/speedrun.md, which also names the recipes
# that were tried and left.
# About an hour on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/speedrun

# Ten seeds of a recipe: digits NAME FLAG...
digits() {
  for seed in 0 1 2 3 4 5 6 7 8 9; do
    python train_at.py --precision bf16 --seed $seed --out-dir $out/digits/$1/$seed "${@:2}"
    python evaluate.py --attack apgd --sanity-images 0 --checkpoint $out/digits/$1/$seed/best.pt
  done
}

digits base & lane=$!
digits two-steps --n-steps 2 --step-size 0.075 --epochs 80
digits small-batches --n-steps 2 --step-size 0.075 --epochs 50 --batch-size 32
wait $lane
python -m runs.speedrun --add $out
