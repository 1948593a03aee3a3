#!/usr/bin/env bash
# The four cells against the number of real digits, the diffusion model trained on the same ones; three seeds, APGD-CE+T on all 797
# test images. 100 digits are runs/digits_table.sh. Then AT and DM-AT with another 100 digits, those that follow 600 held-out ones.
# About an hour on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group, all of which ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
out=out/evidence

# The diffusion model's steps: of 200, 400 and 800 those with the lowest loss on the held-out images (docs/log.md).
diffusion() {
  python train_diffusion.py --val-size 500 --n-train $1 --train-steps $2 --out-dir $out/diffusion-$1
  python generate_synthetic.py --val-size 500 --n-train $1 --diffusion $out/diffusion-$1 --out-dir $out/synthetic-$1
}
cells() {
  recipe=(--val-size 500 --n-train $1 --epoch-images 896 --seed $2)
  python train_at.py "${recipe[@]}" --out-dir $out/digits-$1/at/$2
  python train_at_aux.py "${recipe[@]}" --teacher $out/diffusion-$1 --out-dir $out/digits-$1/at_dra/$2
  python train_at.py "${recipe[@]}" --synthetic $out/synthetic-$1 --out-dir $out/digits-$1/dm_at/$2
  python train_at_aux.py "${recipe[@]}" --synthetic $out/synthetic-$1 --teacher $out/diffusion-$1 --out-dir $out/digits-$1/dm_at_dra/$2
  for cell in at at_dra dm_at dm_at_dra; do python evaluate.py --attack apgd --checkpoint $out/digits-$1/$cell/$2/best.pt; done
}
# AT and DM-AT of seed $1 with the other 100 digits.
other() {
  recipe=(--val-size 600 --n-train 100 --epoch-images 896 --seed $1)
  python train_at.py "${recipe[@]}" --out-dir $out/digits-100-other/at/$1
  python train_at.py "${recipe[@]}" --synthetic $out/synthetic-100-other --out-dir $out/digits-100-other/dm_at/$1
  for cell in at dm_at; do python evaluate.py --attack apgd --checkpoint $out/digits-100-other/$cell/$1/best.pt; done
}
python train_diffusion.py --val-size 600 --n-train 100 --train-steps 200 --out-dir $out/diffusion-100-other
python generate_synthetic.py --val-size 600 --n-train 100 --diffusion $out/diffusion-100-other --out-dir $out/synthetic-100-other
diffusion 200 400 & lane=$!
diffusion 300 400
diffusion 500 800
wait $lane
for run in "200 0" "200 1" "200 2" "300 0"; do cells $run; done & lane=$!
for run in "300 1" "300 2" "500 0" "500 1" "500 2"; do cells $run; done
wait $lane
for seed in 0 1; do other $seed; done & lane=$!
other 2
wait $lane
python -m runs.results --add $out
