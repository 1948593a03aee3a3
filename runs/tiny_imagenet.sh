#!/usr/bin/env bash
# Tiny ImageNet (200 classes, 64 pixels), linf 8/255: the 2 x 2 of diffusion images (DM-AT) and diffusion representations (DRA), WRN-28-10.
#
# NOT RUN HERE: no such data, weights or GPUs were at hand. Each line was only seen to parse; expect to mend settings.
# Meant for one node of 8 GPUs of 80 GB (H100 or A100). Every command resumes or skips what is finished; run a line alone as you like.
# Estimates are not measurements: H100-hours of GPU work, FLOP / (35 % of the peak), computed by `python -m runs.costs runs/tiny_imagenet.sh`.
# One row is one seed; add --seed 1 and another --out-dir for the next. "No public anchor": no figure of others is known to us.
#
# The teacher is NVlabs' ImageNet-64 network. It is class-conditional and was never trained on the null label that it gets here (the
# script warns), and Tiny ImageNet is cut from ImageNet: it may have seen Tiny ImageNet's test images, with their labels. Say so with any result.
# Files to fetch yourself:
#   data/edm-imagenet-64x64-cond-adm.pkl  https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-imagenet-64x64-cond-adm.pkl (CC BY-NC-SA 4.0)
#   data/synthetic/tiny-imagenet-1m.npz   DM-AT's generated set; where: the README of github.com/wzekai99/DM-Improves-AT
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=4

# ---- Teacher
python -m common.edm convert data/edm-imagenet-64x64-cond-adm.pkl out/teacher-imagenet-64

# ---- The table: WRN-28-10, the published 1 M set
# AT: no public anchor
torchrun --nproc_per_node 8 train_at.py --dataset tiny-imagenet --download --out-dir out/tiny-imagenet/at  # estimate: 535 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset tiny-imagenet --attack autoattack --checkpoint out/tiny-imagenet/at/best.pt  # estimate: 48.3 H100-hours
# AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset tiny-imagenet --teacher out/teacher-imagenet-64 --out-dir out/tiny-imagenet/at_dra  # estimate: 578 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset tiny-imagenet --attack autoattack --checkpoint out/tiny-imagenet/at_dra/best.pt  # estimate: 48.3 H100-hours
# DM-AT: 65.19 / 31.30 (DM-AT's README)
torchrun --nproc_per_node 8 train_at.py --dataset tiny-imagenet --synthetic data/synthetic/tiny-imagenet-1m.npz --out-dir out/tiny-imagenet/dm_at  # estimate: 535 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset tiny-imagenet --attack autoattack --checkpoint out/tiny-imagenet/dm_at/best.pt  # estimate: 48.3 H100-hours
# DM-AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset tiny-imagenet --synthetic data/synthetic/tiny-imagenet-1m.npz --teacher out/teacher-imagenet-64 --out-dir out/tiny-imagenet/dm_at_dra  # estimate: 578 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset tiny-imagenet --attack autoattack --checkpoint out/tiny-imagenet/dm_at_dra/best.pt  # estimate: 48.3 H100-hours

# ---- Ablations: PreAct ResNet-18 in bf16, validated each tenth epoch, the 1 M set; no public anchor in any row. Compare within this
# part alone. (Beside so small a classifier the teacher is dear: `runs.costs` prints what DRA adds.)
# Weight of the alignment term; 0 is DM-AT with the head in place, 1 the reference of the rows below; and the shuffled control
torchrun --nproc_per_node 8 train_at_aux.py --dataset tiny-imagenet --model preact-18 --precision bf16 --eval-every 10 --synthetic data/synthetic/tiny-imagenet-1m.npz --teacher out/teacher-imagenet-64 --aux-weight 0 --out-dir out/tiny-imagenet/ablation/weight-0  # estimate: 7.16 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset tiny-imagenet --model preact-18 --precision bf16 --eval-every 10 --synthetic data/synthetic/tiny-imagenet-1m.npz --teacher out/teacher-imagenet-64 --aux-weight 0.3 --out-dir out/tiny-imagenet/ablation/weight-0.3  # estimate: 7.16 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset tiny-imagenet --model preact-18 --precision bf16 --eval-every 10 --synthetic data/synthetic/tiny-imagenet-1m.npz --teacher out/teacher-imagenet-64 --aux-weight 1 --out-dir out/tiny-imagenet/ablation/weight-1  # estimate: 7.16 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset tiny-imagenet --model preact-18 --precision bf16 --eval-every 10 --synthetic data/synthetic/tiny-imagenet-1m.npz --teacher out/teacher-imagenet-64 --aux-weight 3 --out-dir out/tiny-imagenet/ablation/weight-3  # estimate: 7.16 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset tiny-imagenet --model preact-18 --precision bf16 --eval-every 10 --synthetic data/synthetic/tiny-imagenet-1m.npz --teacher out/teacher-imagenet-64 --shuffle-targets --out-dir out/tiny-imagenet/ablation/shuffled  # estimate: 7.16 H100-hours
# Noise level (the default is 0.06) and block (the default is dec.16x16_block1)
torchrun --nproc_per_node 8 train_at_aux.py --dataset tiny-imagenet --model preact-18 --precision bf16 --eval-every 10 --synthetic data/synthetic/tiny-imagenet-1m.npz --teacher out/teacher-imagenet-64 --sigma 0.2 --out-dir out/tiny-imagenet/ablation/sigma-0.2  # estimate: 7.16 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset tiny-imagenet --model preact-18 --precision bf16 --eval-every 10 --synthetic data/synthetic/tiny-imagenet-1m.npz --teacher out/teacher-imagenet-64 --sigma 0.6 --out-dir out/tiny-imagenet/ablation/sigma-0.6  # estimate: 7.16 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset tiny-imagenet --model preact-18 --precision bf16 --eval-every 10 --synthetic data/synthetic/tiny-imagenet-1m.npz --teacher out/teacher-imagenet-64 --block dec.8x8_block3 --out-dir out/tiny-imagenet/ablation/block-dec.8x8_block3  # estimate: 6.60 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset tiny-imagenet --model preact-18 --precision bf16 --eval-every 10 --synthetic data/synthetic/tiny-imagenet-1m.npz --teacher out/teacher-imagenet-64 --block dec.32x32_block1 --out-dir out/tiny-imagenet/ablation/block-dec.32x32_block1  # estimate: 8.71 H100-hours

# Ablations are compared by AutoAttack's first two attacks, a fifth of its cost (not in the estimates)
for run in out/tiny-imagenet/ablation/*; do
  torchrun --nproc_per_node 8 evaluate.py --dataset tiny-imagenet --attack apgd --checkpoint "$run/best.pt"
done
