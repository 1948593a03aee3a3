#!/usr/bin/env bash
# The quickstart's table: 2 x 2 of synthetic images (DM-AT) and representations (DRA) on digits, one
# seed, from nothing. `make quickstart` calls it. Every command resumes or skips what is finished.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
out=out/quickstart
images=out/synthetic-digits
export CUDA_VISIBLE_DEVICES=  # the table is of CPUs; two processes would need two GPUs
export OMP_NUM_THREADS=1      # small networks: two commands at once, one core each, are faster

stage() { printf '\n== %s\n' "$*"; }

stage "1/6 train the diffusion model"
OMP_NUM_THREADS=2 python train_diffusion.py

stage "2/6 generate 10,000 labelled digits"
torchrun --nproc_per_node 2 generate_synthetic.py

stage "3/6 train AT and AT+DRA"
python train_at.py --out-dir $out/at & first=$!
TQDM_POSITION=1 python train_at_aux.py --out-dir $out/at_dra & second=$!
wait $first
wait $second

stage "4/6 train DM-AT and DM-AT+DRA"
python train_at.py --synthetic $images --out-dir $out/dm_at & first=$!
TQDM_POSITION=1 python train_at_aux.py --synthetic $images --out-dir $out/dm_at_dra & second=$!
wait $first
wait $second

stage "5/6 attack the four on all 797 test images (APGD-CE+T, linf 0.15)"
torchrun --nproc_per_node 2 evaluate.py --attack apgd --checkpoint $out/at/best.pt
torchrun --nproc_per_node 2 evaluate.py --attack apgd --checkpoint $out/at_dra/best.pt
torchrun --nproc_per_node 2 evaluate.py --attack apgd --checkpoint $out/dm_at/best.pt
torchrun --nproc_per_node 2 evaluate.py --attack apgd --checkpoint $out/dm_at_dra/best.pt

stage "6/6 table and picture"
python -m runs.report --runs $out --synthetic $images
