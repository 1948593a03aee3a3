#!/usr/bin/env bash
# The four cells against the number of real digits, the diffusion model trained on the same ones;
# three seeds, APGD-CE+T on all 797 test images. 100 digits are runs/digits_table.sh. Then AT and
# DM-AT with another 100 digits, those that follow 600 held-out ones. Held out are 500 images, with
# 800 digits the 200 that are left.
# An hour and a half on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/evidence

# A diffusion model and its images: diffusion NAME VAL_SIZE N_TRAIN STEPS
diffusion() {
  local digits="--val-size $2 --n-train $3"
  python train_diffusion.py $digits --train-steps $4 --out-dir $out/diffusion-$1
  python generate_synthetic.py $digits --diffusion $out/diffusion-$1 --out-dir $out/synthetic-$1
}
# One cell: cell EXPERIMENT/CELL/SEED SCRIPT FLAG...
cell() {
  python $2 --seed ${1##*/} --epoch-images 896 --out-dir $out/$1 "${@:3}"
  python evaluate.py --attack apgd --checkpoint $out/$1/best.pt
}
# The four cells of one seed: cells VAL_SIZE N_TRAIN SEED
cells() {
  local digits="--val-size $1 --n-train $2"
  local dm="--synthetic $out/synthetic-$2"
  local dra="--teacher $out/diffusion-$2"
  cell digits-$2/at/$3 train_at.py $digits
  cell digits-$2/at_dra/$3 train_at_aux.py $digits $dra
  cell digits-$2/dm_at/$3 train_at.py $digits $dm
  cell digits-$2/dm_at_dra/$3 train_at_aux.py $digits $dm $dra
}
# AT and DM-AT with the other 100 digits: other SEED
other() {
  local digits="--val-size 600 --n-train 100"
  cell digits-100-other/at/$1 train_at.py $digits
  cell digits-100-other/dm_at/$1 train_at.py $digits --synthetic $out/synthetic-100-other
}

# Of 200, 400 and 800 steps those with the lowest loss on the held-out images (docs/log.md); with
# 800 digits the 1,200 of the quickstart.
diffusion 100-other 600 100 200
diffusion 200 500 200 400 & lane=$!
diffusion 300 500 300 400
diffusion 500 500 500 800
wait $lane
diffusion 800 200 800 1200
for seed in 0 1 2; do
  cells 500 200 $seed
  cells 200 800 $seed
done & lane=$!
for seed in 0 1 2; do
  cells 500 300 $seed
  cells 500 500 $seed
done
wait $lane
for seed in 0 1; do other $seed; done & lane=$!
other 2
wait $lane
python -m runs.results --add $out
