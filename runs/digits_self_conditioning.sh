#!/usr/bin/env bash
# What --self-conditioning gives the diffusion model of 800 digits: its loss on the 200 held-out
# digits, and a linear probe of its features there, five seeds. Networks of one seed have the same
# initial weights and the same random numbers. The last command prints the table.
# About half an hour on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/self-conditioning

# One network: network KIND SEED FLAG...
network() {
  python train_diffusion.py --seed $2 --out-dir $out/$1/$2 "${@:3}"
  python extract_features.py --diffusion $out/$1/$2 --blocks mid_block up_blocks.0.resnets.0 \
    --sigmas 0.1 --probe --out-dir $out/$1-features/$2
}
for seed in 0 1 2 3 4; do network plain $seed; done & lane=$!
for seed in 0 1 2 3 4; do network conditioned $seed --self-conditioning; done
wait $lane
python -m runs.self_conditioning $out
