#!/usr/bin/env bash
# runs/analysis.sh on Fashion-MNIST, two seeds, 6,400 real images to train as in
# runs/fashion_mnist.sh, whose diffusion model and 5,000 synthetic images (its first two commands)
# it uses. About an hour on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/analysis-fashion
fashion="--dataset fashion-mnist --data-dir ${FASHION:-/usr/share/datasets/fashion-mnist}"
dm="--synthetic out/synthetic-fashion-mnist"

# train KIND SEED SCRIPT FLAG...
train() { python $3 $fashion --n-train 6400 --seed $2 --out-dir $out/$1-$2 "${@:4}"; }
# The flags of analyze.py for classifiers of these kinds: models KIND...
models() {
  for kind in "$@"; do
    for seed in 0 1; do echo "--model $kind=$out/$kind-$seed/best.pt"; done
  done
}

without() {
  for seed in 0 1; do
    train at $seed train_at.py
    train dm_at $seed train_at.py $dm
    train standard $seed train_at.py --loss standard
  done
}
with() {
  for seed in 0 1; do
    train at_dra $seed train_at_aux.py
    train dm_at_dra $seed train_at_aux.py $dm
  done
}
without & lane=$!
with
wait $lane

torchrun --nproc_per_node 2 analyze.py $fashion $(models standard at at_dra dm_at dm_at_dra) \
  --teacher out/diffusion-fashion-mnist --out-dir $out
python -m analysis.claims --analysis $out
