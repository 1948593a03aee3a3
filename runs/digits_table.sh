#!/usr/bin/env bash
# The table of README's results: AT, AT+DRA, DM-AT, DM-AT+DRA and two controls, ten seeds each, where data are short: 100 real digits,
# on which the diffusion model is trained too. All choices were made on the first 500 training images, held out (docs/log.md).
# The cells of a seed share the initial weights; those that differ in DRA alone also batches, crops and attack starts.
# About two hours on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group, all of which ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/evidence/digits-100
teacher=out/evidence/diffusion-100
images=out/evidence/synthetic-100
recipe=(--val-size 500 --n-train 100 --epoch-images 896 --seed)

python train_diffusion.py --val-size 500 --n-train 100 --train-steps 200 --out-dir $teacher
python generate_synthetic.py --val-size 500 --n-train 100 --diffusion $teacher --out-dir $images

# Everything of one seed.
cells() {
  seed=$1
  python train_at.py "${recipe[@]}" $seed --out-dir $out/at/$seed
  python train_at_aux.py "${recipe[@]}" $seed --teacher $teacher --out-dir $out/at_dra/$seed
  python train_at.py "${recipe[@]}" $seed --synthetic $images --out-dir $out/dm_at/$seed
  python train_at_aux.py "${recipe[@]}" $seed --synthetic $images --teacher $teacher --out-dir $out/dm_at_dra/$seed
  python train_at_aux.py "${recipe[@]}" $seed --synthetic $images --teacher $teacher --shuffle-targets --out-dir $out/shuffled/$seed
  python train_at_aux.py "${recipe[@]}" $seed --synthetic $images --teacher $teacher --aux-weight 0 --out-dir $out/zero/$seed
  python evaluate.py --attack autoattack --checkpoint $out/at/$seed/best.pt
  python evaluate.py --attack autoattack --checkpoint $out/at_dra/$seed/best.pt
  python evaluate.py --attack autoattack --checkpoint $out/dm_at/$seed/best.pt
  python evaluate.py --attack autoattack --checkpoint $out/dm_at_dra/$seed/best.pt
  python evaluate.py --attack autoattack --checkpoint $out/shuffled/$seed/best.pt
  # Weight 0 should be DM-AT to the bit; where it is, there is nothing to attack again.
  cmp $out/dm_at/$seed/best.pt $out/zero/$seed/best.pt || python evaluate.py --attack autoattack --checkpoint $out/zero/$seed/best.pt
}
for seed in 0 2 4 6 8; do cells $seed; done & lane=$!
for seed in 1 3 5 7 9; do cells $seed; done
wait $lane
python -m runs.results --add out/evidence
