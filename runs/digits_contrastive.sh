#!/usr/bin/env bash
# DRA as a contrast (--align-loss contrastive) without synthetic images, and the same with shuffled targets: ten seeds each, beside AT of
# runs/digits_table.sh, after which it comes; APGD-CE+T on all 797 test images. About half an hour on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group, all of which ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/evidence/digits-100
flags=(--val-size 500 --n-train 100 --epoch-images 896 --teacher out/evidence/diffusion-100 --align-loss contrastive)

for seed in 0 1 2 3 4 5 6 7 8 9; do
  python train_at_aux.py "${flags[@]}" --seed $seed --shuffle-targets --out-dir $out/at_dra,align_loss=contrastive,shuffled/$seed
  python evaluate.py --attack apgd --checkpoint $out/at_dra,align_loss=contrastive,shuffled/$seed/best.pt
done & lane=$!
for seed in 0 1 2 3 4 5 6 7 8 9; do
  python train_at_aux.py "${flags[@]}" --seed $seed --out-dir $out/at_dra,align_loss=contrastive/$seed
  python evaluate.py --attack apgd --checkpoint $out/at_dra,align_loss=contrastive/$seed/best.pt
done
wait $lane
python -m runs.results --add out/evidence
