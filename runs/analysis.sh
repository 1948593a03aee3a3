#!/usr/bin/env bash
# What the representations look like on digits: four kinds of adversarially trained classifiers and standard ones, five seeds each, and
# the diffusion model. After runs/quickstart.sh, whose diffusion model and images it uses. About half an hour on two CPU cores; resumes.
set -meuo pipefail  # -m: a job in the background is a process group, all of which ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
out=out/analysis-digits
for seed in 0 1 2 3 4; do
  python train_at.py --seed $seed --out-dir $out/at-$seed & first=$!
  python train_at_aux.py --seed $seed --out-dir $out/at_dra-$seed
  wait $first
  python train_at.py --seed $seed --synthetic out/synthetic-digits --out-dir $out/dm_at-$seed & first=$!
  python train_at_aux.py --seed $seed --synthetic out/synthetic-digits --out-dir $out/dm_at_dra-$seed
  wait $first
  python train_at.py --seed $seed --loss standard --out-dir $out/standard-$seed
done
models=()
for kind in standard at at_dra dm_at dm_at_dra; do
  for seed in 0 1 2 3 4; do models+=(--model "$kind=$out/$kind-$seed/best.pt"); done
done
torchrun --nproc_per_node 2 analyze.py "${models[@]}" --teacher out/diffusion-digits --out-dir $out
python -m runs.claims --analysis $out
# Sparser and less sparse autoencoders.
models=()
for kind in at at_dra; do
  for seed in 0 1 2 3 4; do models+=(--model "$kind=$out/$kind-$seed/best.pt"); done
done
for k in 4 16; do torchrun --nproc_per_node 2 analyze.py "${models[@]}" --sae-k $k --sae-seeds 1 --out-dir out/analysis-digits-k$k; done
torchrun --nproc_per_node 2 extract_features.py --probe --n-draws 2 --eps 0.05 --out-dir out/features-digits-2-draws
