#!/usr/bin/env bash
# The four cells against the number of real digits, the diffusion model trained on the same ones; five seeds, APGD-CE+T on all 797 test
# images. 100 digits are runs/digits_table.sh. About four hours on two CPU cores; every command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
out=out/evidence

# The diffusion model's steps: of 200, 400 and 800 those with the lowest loss on the held-out images (docs/log.md).
diffusion() {
  python train_diffusion.py --val-size 500 --n-train $1 --train-steps $2 --out-dir $out/diffusion-$1
  python generate_synthetic.py --val-size 500 --n-train $1 --diffusion $out/diffusion-$1 --out-dir $out/synthetic-$1
}
cells() {
  for n in 200 300 500; do
    recipe=(--val-size 500 --n-train $n --epoch-images 896 --seed $1)
    python train_at.py "${recipe[@]}" --out-dir $out/digits-$n/at/$1
    python train_at_aux.py "${recipe[@]}" --teacher $out/diffusion-$n --out-dir $out/digits-$n/at_dra/$1
    python train_at.py "${recipe[@]}" --synthetic $out/synthetic-$n --out-dir $out/digits-$n/dm_at/$1
    python train_at_aux.py "${recipe[@]}" --synthetic $out/synthetic-$n --teacher $out/diffusion-$n --out-dir $out/digits-$n/dm_at_dra/$1
    for cell in at at_dra dm_at dm_at_dra; do python evaluate.py --attack apgd --checkpoint $out/digits-$n/$cell/$1/best.pt; done
  done
}
diffusion 200 400 & lane=$!
diffusion 300 400
diffusion 500 800
wait $lane
for seed in 0 2 4; do cells $seed; done & lane=$!
for seed in 1 3; do cells $seed; done
wait $lane
python -m runs.results --add $out
