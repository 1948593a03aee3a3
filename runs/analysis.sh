#!/usr/bin/env bash
# What the representations look like on digits: four kinds of adversarially trained classifiers and
# standard ones, five seeds each, and the diffusion model. After runs/quickstart.sh, whose diffusion
# model and images it uses. About half an hour on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/analysis-digits
dm="--synthetic out/synthetic-digits"
seeds="0 1 2 3 4"

# train KIND SEED SCRIPT FLAG...
train() { python $3 --seed $2 --out-dir $out/$1-$2 "${@:4}"; }
# The flags of analyze.py for classifiers of these kinds: models KIND...
models() {
  for kind in "$@"; do
    for seed in $seeds; do echo "--model $kind=$out/$kind-$seed/best.pt"; done
  done
}

without() {
  for seed in $seeds; do
    train at $seed train_at.py
    train dm_at $seed train_at.py $dm
    train standard $seed train_at.py --loss standard
  done
}
with() {
  for seed in $seeds; do
    train at_dra $seed train_at_aux.py
    train dm_at_dra $seed train_at_aux.py $dm
  done
}
without & lane=$!
with
wait $lane

torchrun --nproc_per_node 2 analyze.py $(models standard at at_dra dm_at dm_at_dra) \
  --teacher out/diffusion-digits --out-dir $out
python -m analysis.claims --analysis $out
# Sparser and less sparse autoencoders.
for k in 4 16; do
  torchrun --nproc_per_node 2 analyze.py $(models at at_dra) --sae-k $k --sae-seeds 1 \
    --out-dir $out-k$k
done
torchrun --nproc_per_node 2 extract_features.py --probe --n-draws 2 --eps 0.05 \
  --out-dir out/features-digits-2-draws
