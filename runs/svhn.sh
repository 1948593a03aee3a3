#!/usr/bin/env bash
# SVHN (train and test, without extra), linf 8/255: the 2 x 2 of diffusion images (DM-AT) and diffusion representations (DRA), WRN-28-10.
#
# NOT RUN HERE: no such data, weights or GPUs were at hand. Each line was only seen to parse; expect to mend settings.
# Meant for one node of 8 GPUs of 80 GB (H100 or A100). Every command resumes or skips what is finished; run a line alone as you like.
# Estimates are not measurements: H100-hours of GPU work, FLOP / (35 % of the peak), computed by `python -m runs.costs runs/svhn.sh`.
# One row is one seed; add --seed 1 and another --out-dir for the next. "No public anchor": no figure of others is known to us.
#
# We know of no public diffusion network of SVHN: the teacher is trained here, with settings that we have not tried.
# Files to fetch yourself: data/synthetic/svhn-1m.npz and svhn-50m-part1.npz to 4, DM-AT's generated sets; where: the README of
# github.com/wzekai99/DM-Improves-AT. The classifiers' recipe is DM-AT's for CIFAR-10; what its authors changed for SVHN is not known to us.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=4

# ---- Teacher, and a synthetic set of our own from it
torchrun --nproc_per_node 8 train_diffusion.py --dataset svhn --download --val-size 1024 --channels 128 256 256 --layers-per-block 2 --train-steps 100000 --batch-size 256 --lr 2e-4 --warmup-steps 5000 --ema-decay 0.9995 --eval-every 5000  # estimate: 10.3 H100-hours
torchrun --nproc_per_node 8 generate_synthetic.py --dataset svhn --val-size 1024 --n-images 1000000 --shard-size 25000 --out-dir out/svhn/synthetic  # estimate: 4.70 H100-hours
torchrun --nproc_per_node 8 extract_features.py --dataset svhn --val-size 1024 --probe --out-dir out/svhn/features  # estimate: 0.0533 H100-hours

# ---- The table: WRN-28-10, the published 50 M set
# AT: no public anchor
torchrun --nproc_per_node 8 train_at.py --dataset svhn --out-dir out/svhn/at  # estimate: 99.4 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset svhn --attack autoattack --checkpoint out/svhn/at/best.pt  # estimate: 31.4 H100-hours
# AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset svhn --out-dir out/svhn/at_dra  # estimate: 101 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset svhn --attack autoattack --checkpoint out/svhn/at_dra/best.pt  # estimate: 31.4 H100-hours
# DM-AT: 95.56 / 64.01 (DM-AT's README)
torchrun --nproc_per_node 8 train_at.py --dataset svhn --synthetic data/synthetic/svhn-50m-part1.npz data/synthetic/svhn-50m-part2.npz data/synthetic/svhn-50m-part3.npz data/synthetic/svhn-50m-part4.npz --synthetic-fraction 0.8 --out-dir out/svhn/dm_at  # estimate: 99.4 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset svhn --attack autoattack --checkpoint out/svhn/dm_at/best.pt  # estimate: 31.4 H100-hours
# DM-AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset svhn --synthetic data/synthetic/svhn-50m-part1.npz data/synthetic/svhn-50m-part2.npz data/synthetic/svhn-50m-part3.npz data/synthetic/svhn-50m-part4.npz --synthetic-fraction 0.8 --out-dir out/svhn/dm_at_dra  # estimate: 101 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset svhn --attack autoattack --checkpoint out/svhn/dm_at_dra/best.pt  # estimate: 31.4 H100-hours

# ---- Ablations: WRN-28-10 in bf16, validated each tenth epoch; no public anchor in any row. Compare within this part alone
# Weight of the alignment term; 0 is AT with the head in place, 1 the reference of the rows below; and the shuffled control
torchrun --nproc_per_node 8 train_at_aux.py --dataset svhn --precision bf16 --eval-every 10 --aux-weight 0 --out-dir out/svhn/ablation/weight-0  # estimate: 6.95 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset svhn --precision bf16 --eval-every 10 --aux-weight 0.3 --out-dir out/svhn/ablation/weight-0.3  # estimate: 6.95 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset svhn --precision bf16 --eval-every 10 --aux-weight 1 --out-dir out/svhn/ablation/weight-1  # estimate: 6.95 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset svhn --precision bf16 --eval-every 10 --aux-weight 3 --out-dir out/svhn/ablation/weight-3  # estimate: 6.95 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset svhn --precision bf16 --eval-every 10 --shuffle-targets --out-dir out/svhn/ablation/shuffled  # estimate: 6.95 H100-hours
# Noise level (the default is 0.1) and block (the default is up_blocks.0.resnets.0)
torchrun --nproc_per_node 8 train_at_aux.py --dataset svhn --precision bf16 --eval-every 10 --sigma 0.3 --out-dir out/svhn/ablation/sigma-0.3  # estimate: 6.95 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset svhn --precision bf16 --eval-every 10 --block up_blocks.1.resnets.1 --out-dir out/svhn/ablation/block-up_blocks.1.resnets.1  # estimate: 7.02 H100-hours
# Amount of synthetic data, DM-AT+DRA: the published 1 M; our own 1 M
torchrun --nproc_per_node 8 train_at_aux.py --dataset svhn --precision bf16 --eval-every 10 --synthetic data/synthetic/svhn-1m.npz --out-dir out/svhn/ablation/dm_at_dra-1m  # estimate: 6.95 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset svhn --precision bf16 --eval-every 10 --synthetic out/svhn/synthetic --out-dir out/svhn/ablation/dm_at_dra-own  # estimate: 6.95 H100-hours

# Ablations are compared by AutoAttack's first two attacks, a fifth of its cost (not in the estimates)
for run in out/svhn/ablation/*; do
  torchrun --nproc_per_node 8 evaluate.py --dataset svhn --attack apgd --checkpoint "$run/best.pt"
done
