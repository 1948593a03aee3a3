#!/usr/bin/env bash
# runs/analysis.sh on Fashion-MNIST, two seeds, 6,400 real images to train as in runs/fashion_mnist.sh, whose diffusion model and 5,000
# synthetic images (its first two commands) it uses. About an hour on two CPU cores; resumes.
set -meuo pipefail  # -m: a job in the background is a process group, all of which ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
out=out/analysis-fashion
fashion=(--dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist)
for seed in 0 1; do
  python train_at.py "${fashion[@]}" --n-train 6400 --seed $seed --out-dir $out/at-$seed & first=$!
  python train_at_aux.py "${fashion[@]}" --n-train 6400 --seed $seed --out-dir $out/at_dra-$seed
  wait $first
  python train_at.py "${fashion[@]}" --n-train 6400 --seed $seed --synthetic out/synthetic-fashion-mnist --out-dir $out/dm_at-$seed & first=$!
  python train_at_aux.py "${fashion[@]}" --n-train 6400 --seed $seed --synthetic out/synthetic-fashion-mnist --out-dir $out/dm_at_dra-$seed
  wait $first
done
for seed in 0 1; do python train_at.py "${fashion[@]}" --n-train 6400 --seed $seed --loss standard --out-dir $out/standard-$seed; done
models=()
for kind in standard at at_dra dm_at dm_at_dra; do
  for seed in 0 1; do models+=(--model "$kind=$out/$kind-$seed/best.pt"); done
done
torchrun --nproc_per_node 2 analyze.py "${fashion[@]}" "${models[@]}" --teacher out/diffusion-fashion-mnist --out-dir $out
python -m runs.claims --analysis $out
