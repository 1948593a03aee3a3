#!/usr/bin/env bash
# Fashion-MNIST, real 28 x 28 images: the 2 x 2 at a small budget, three seeds. The classifiers
# train on 6,400 real images (500 steps of 128); the diffusion model on all 58,976 that are not held
# out, so that its images and representations know more than AT sees. The data are those of
# Debian's package dataset-fashion-mnist; FASHION=DIR names another place.
# About two hours on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/evidence/fashion-6400
fashion="--dataset fashion-mnist --data-dir ${FASHION:-/usr/share/datasets/fashion-mnist}"
dm="--synthetic out/synthetic-fashion-mnist"

# The diffusion model (600 k parameters, about 20 minutes on one core) and 5,000 images.
python train_diffusion.py $fashion --val-size 1024 --channels 24 48 48 --batch-size 64 \
  --train-steps 1500 --eval-every 300
torchrun --nproc_per_node 2 generate_synthetic.py $fashion --val-size 1024 --n-images 5000 \
  --shard-size 500 --n-steps 10

# One cell, with APGD-CE+T (an upper bound on robust accuracy) on the first 500 test images:
# cell NAME SEED SCRIPT FLAG...
cell() {
  python $3 $fashion --n-train 6400 --seed $2 --out-dir $out/$1/$2 "${@:4}"
  python evaluate.py $fashion --attack apgd --n-images 500 --checkpoint $out/$1/$2/best.pt
}
without() {
  for seed in 0 1 2; do
    cell at $seed train_at.py
    cell dm_at $seed train_at.py $dm
  done
}
with() {
  for seed in 0 1 2; do
    cell at_dra $seed train_at_aux.py
    cell dm_at_dra $seed train_at_aux.py $dm
  done
}
without & lane=$!
with
wait $lane
python -m runs.results --add out/evidence
