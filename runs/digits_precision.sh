#!/usr/bin/env bash
# Does bf16 cost accuracy? AT of 800 digits in fp32 and in bf16, ten seeds, paired: cells of one seed
# have the same initial weights, batches, crops and attack starts. APGD-CE+T in fp32 on all 797 test
# images. The last command writes the table of docs/costs.md.
# About half an hour on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/precision

# One cell: cell PRECISION SEED
cell() {
  python train_at.py --precision $1 --seed $2 --out-dir $out/$1/$2
  python evaluate.py --attack apgd --sanity-images 0 --checkpoint $out/$1/$2/best.pt
}
for seed in 0 1 2 3 4 5 6 7 8 9; do cell fp32 $seed; done & lane=$!
for seed in 0 1 2 3 4 5 6 7 8 9; do cell bf16 $seed; done
wait $lane
python -m benchmarks.accuracy $out
