#!/usr/bin/env bash
# Which recipe reaches a robust accuracy with the fewest passes? Ten seeds of every recipe, attacked
# by APGD-CE+T. The last command writes the tables of docs/speedrun.md, which also names the recipes
# that were tried and left.
# CIFAR-10 lies in data/, as class folders or as the archive; DATA=DIR names another place.
# About 1.5 hours on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/speedrun
cifar="--dataset cifar10 --data-dir ${DATA:-data}"
short="--model wrn-10-1 --epoch-images 3200 --clip-norm 5 --warmup-fraction 0.2 --eval-every 5
  --eval-n-steps 10"

# Ten seeds of a recipe, attacked on all test images: digits NAME FLAG...
digits() {
  for seed in 0 1 2 3 4 5 6 7 8 9; do
    python train_at.py --precision bf16 --seed $seed --out-dir $out/digits/$1/$seed "${@:2}"
    python evaluate.py --attack apgd --sanity-images 0 --checkpoint $out/digits/$1/$seed/best.pt
  done
}
# The same on CIFAR-10, attacked on 500: cifar NAME FLAG...
cifar() {
  for seed in 0 1 2 3 4 5 6 7 8 9; do
    local run=$out/cifar10/$1/$seed
    python train_at.py $cifar $short --precision bf16 --seed $seed --out-dir $run "${@:2}"
    python evaluate.py $cifar --attack apgd --n-images 500 --sanity-images 0 \
      --checkpoint $run/best.pt
  done
}

python train_at.py $cifar $short --batch-size 128 --check  # is the data there?
{
  cifar base --batch-size 128 --epochs 10
  cifar fast --batch-size 32 --epochs 8 --n-steps 2 --step-size 4/255
} & lane=$!
digits base
digits two-steps --n-steps 2 --step-size 0.075 --epochs 80
digits small-batches --n-steps 2 --step-size 0.075 --epochs 50 --batch-size 32
digits fast --recipe fast
wait $lane
python -m runs.speedrun --add $out
