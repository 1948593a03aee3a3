#!/usr/bin/env bash
# CIFAR-10, linf 8/255: the 2 x 2 of diffusion images (DM-AT) and diffusion representations (DRA), WRN-28-10; then larger runs,
# ViT-B/2, and one line per ablation. Clean / AutoAttack accuracy of the first 2 x 2 is the table.
#
# NOT RUN HERE: no such data, weights or GPUs were at hand. Each line was only seen to parse; expect to mend settings.
# Meant for one node of 8 GPUs of 80 GB (H100 or A100). Every command resumes or skips what is finished; run a line alone as you like.
# Estimates are not measurements: H100-hours of GPU work, FLOP / (35 % of the peak), computed by `python -m runs.costs runs/cifar10.sh`.
# fp32 is the base recipe's precision. bf16 is some ten times cheaper on paper; validation stays fp32, hence --eval-every 10 beside it.
# One row is one seed; add --seed 1 and another --out-dir for the next. "No public anchor": no figure of others is known to us.
#
# Files to fetch yourself:
#   data/edm-cifar10-32x32-uncond-vp.pkl  https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl
#   data/edm-cifar10-32x32-cond-vp.pkl    https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl
#     NVlabs' EDM networks, CC BY-NC-SA 4.0: not for commercial use.
#   data/synthetic/cifar10-1m.npz, cifar10-20m-part1.npz and 2, cifar10-50m-part1.npz to 4
#     DM-AT's generated sets; the README of github.com/wzekai99/DM-Improves-AT links them (cifar10/1m.npz, 20m_part1.npz, ...).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=4

# ---- Teacher (unconditional: no label can leak), and a synthetic set of our own: 5 M images, the best fifth by class kept
python -m common.edm convert data/edm-cifar10-32x32-uncond-vp.pkl out/teacher-cifar10
python -m common.edm convert data/edm-cifar10-32x32-cond-vp.pkl out/edm-cifar10-cond
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --download --loss standard --eval-n-steps 1 --out-dir out/cifar10/standard  # estimate: 7.68 H100-hours
torchrun --nproc_per_node 8 generate_synthetic.py --dataset cifar10 --diffusion out/edm-cifar10-cond --n-images 5000000 --shard-size 25000 --n-steps 20 --keep-fraction 0.2 --classifier out/cifar10/standard/best.pt --out-dir out/cifar10/synthetic  # estimate: 98.5 H100-hours
# Which block and noise level know the class? (linear probe on held-out training images)
torchrun --nproc_per_node 8 extract_features.py --dataset cifar10 --val-size 1024 --diffusion out/teacher-cifar10 --blocks enc.16x16_block3 dec.8x8_in1 dec.8x8_block4 dec.16x16_block1 dec.16x16_block4 dec.32x32_block1 --sigmas 0.02 0.06 0.2 0.6 --probe --out-dir out/cifar10/features  # estimate: 0.0892 H100-hours

# ---- The table: WRN-28-10, the published 1 M set
# AT: no public anchor
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --out-dir out/cifar10/at  # estimate: 69.0 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack autoattack --checkpoint out/cifar10/at/best.pt  # estimate: 12.1 H100-hours
# AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --teacher out/teacher-cifar10 --out-dir out/cifar10/at_dra  # estimate: 73.3 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack autoattack --checkpoint out/cifar10/at_dra/best.pt  # estimate: 12.1 H100-hours
# DM-AT: 91.12 / 63.35 (DM-AT's row in the README of DKL)
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --synthetic data/synthetic/cifar10-1m.npz --out-dir out/cifar10/dm_at  # estimate: 69.0 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack autoattack --checkpoint out/cifar10/dm_at/best.pt  # estimate: 12.1 H100-hours
# DM-AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --synthetic data/synthetic/cifar10-1m.npz --teacher out/teacher-cifar10 --out-dir out/cifar10/dm_at_dra  # estimate: 73.3 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack autoattack --checkpoint out/cifar10/dm_at_dra/best.pt  # estimate: 12.1 H100-hours

# ---- Larger runs. The anchors had batch sizes and numbers of epochs of their own (argtxt beside DM-AT's checkpoints), not set here
# WRN-28-10, 20 M, DM-AT: 92.44 / 67.31 (DM-AT's README, RobustBench)
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --synthetic data/synthetic/cifar10-20m-part1.npz data/synthetic/cifar10-20m-part2.npz --synthetic-fraction 0.8 --out-dir out/cifar10/dm_at-20m  # estimate: 69.0 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack autoattack --checkpoint out/cifar10/dm_at-20m/best.pt  # estimate: 12.1 H100-hours
# WRN-28-10, 20 M, DM-AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --synthetic data/synthetic/cifar10-20m-part1.npz data/synthetic/cifar10-20m-part2.npz --synthetic-fraction 0.8 --teacher out/teacher-cifar10 --out-dir out/cifar10/dm_at_dra-20m  # estimate: 73.3 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack autoattack --checkpoint out/cifar10/dm_at_dra-20m/best.pt  # estimate: 12.1 H100-hours
# WRN-70-16, 50 M, DM-AT: 93.25 / 70.69 (DM-AT's README, RobustBench)
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --model wrn-70-16 --synthetic data/synthetic/cifar10-50m-part1.npz data/synthetic/cifar10-50m-part2.npz data/synthetic/cifar10-50m-part3.npz data/synthetic/cifar10-50m-part4.npz --synthetic-fraction 0.8 --out-dir out/cifar10/wrn-70-16-dm_at-50m  # estimate: 510 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack autoattack --checkpoint out/cifar10/wrn-70-16-dm_at-50m/best.pt  # estimate: 89.3 H100-hours
# WRN-70-16, 50 M, DM-AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --model wrn-70-16 --synthetic data/synthetic/cifar10-50m-part1.npz data/synthetic/cifar10-50m-part2.npz data/synthetic/cifar10-50m-part3.npz data/synthetic/cifar10-50m-part4.npz --synthetic-fraction 0.8 --teacher out/teacher-cifar10 --out-dir out/cifar10/wrn-70-16-dm_at_dra-50m  # estimate: 515 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack autoattack --checkpoint out/cifar10/wrn-70-16-dm_at_dra-50m/best.pt  # estimate: 89.3 H100-hours

# ---- ViT-B/2: the recipe is ours; no public anchor in any row
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --model vit-b-2 --precision bf16 --eval-every 10 --out-dir out/cifar10/vit-b-2-at  # estimate: 21.6 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack autoattack --checkpoint out/cifar10/vit-b-2-at/best.pt  # estimate: 53.6 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --model vit-b-2 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --out-dir out/cifar10/vit-b-2-at_dra  # estimate: 21.9 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack autoattack --checkpoint out/cifar10/vit-b-2-at_dra/best.pt  # estimate: 53.6 H100-hours
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --model vit-b-2 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar10-1m.npz --out-dir out/cifar10/vit-b-2-dm_at  # estimate: 21.6 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack autoattack --checkpoint out/cifar10/vit-b-2-dm_at/best.pt  # estimate: 53.6 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --model vit-b-2 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar10-1m.npz --teacher out/teacher-cifar10 --out-dir out/cifar10/vit-b-2-dm_at_dra  # estimate: 21.9 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack autoattack --checkpoint out/cifar10/vit-b-2-dm_at_dra/best.pt  # estimate: 53.6 H100-hours

# ---- Ablations: WRN-28-10 in bf16, validated each tenth epoch; no public anchor in any row. Compare within this part alone
# Weight of the alignment term; 0 is AT with the head in place (train_at.py's very weights), 1 the reference of all rows below
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --aux-weight 0 --out-dir out/cifar10/ablation/weight-0  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --aux-weight 0.1 --out-dir out/cifar10/ablation/weight-0.1  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --aux-weight 0.3 --out-dir out/cifar10/ablation/weight-0.3  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --aux-weight 1 --out-dir out/cifar10/ablation/weight-1  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --aux-weight 3 --out-dir out/cifar10/ablation/weight-3  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --aux-weight 10 --out-dir out/cifar10/ablation/weight-10  # estimate: 5.10 H100-hours
# Control: the head, its cost and its gradients, but another image's target
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --shuffle-targets --out-dir out/cifar10/ablation/shuffled  # estimate: 5.10 H100-hours
# Noise level (the default is 0.06)
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --sigma 0.02 --out-dir out/cifar10/ablation/sigma-0.02  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --sigma 0.2 --out-dir out/cifar10/ablation/sigma-0.2  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --sigma 0.6 --out-dir out/cifar10/ablation/sigma-0.6  # estimate: 5.10 H100-hours
# Block (the default is dec.16x16_block1)
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --block enc.16x16_block3 --out-dir out/cifar10/ablation/block-enc.16x16_block3  # estimate: 5.03 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --block dec.8x8_in1 --out-dir out/cifar10/ablation/block-dec.8x8_in1  # estimate: 5.04 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --block dec.8x8_block4 --out-dir out/cifar10/ablation/block-dec.8x8_block4  # estimate: 5.06 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --block dec.16x16_block4 --out-dir out/cifar10/ablation/block-dec.16x16_block4  # estimate: 5.16 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --block dec.32x32_block1 --out-dir out/cifar10/ablation/block-dec.32x32_block1  # estimate: 5.32 H100-hours
# Which images' features are aligned (the default is adv)
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --align clean --out-dir out/cifar10/ablation/align-clean  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --align both --out-dir out/cifar10/ablation/align-both  # estimate: 5.11 H100-hours
# Another teacher: DDPM, fetched from the hub
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --teacher hub:google/ddpm-cifar10-32 --out-dir out/cifar10/ablation/teacher-ddpm  # estimate: 4.88 H100-hours
# Another loss: PGD-AT without and with DRA
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --precision bf16 --eval-every 10 --loss pgd --out-dir out/cifar10/ablation/pgd-at  # estimate: 4.30 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --loss pgd --teacher out/teacher-cifar10 --out-dir out/cifar10/ablation/pgd-at_dra  # estimate: 4.60 H100-hours
# Amount of synthetic data, without and with DRA: 1 M, 20 M, 50 M at the same number of steps; and our own set in place of the published 1 M
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar10-1m.npz --out-dir out/cifar10/ablation/dm_at-1m  # estimate: 4.81 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar10-1m.npz --teacher out/teacher-cifar10 --out-dir out/cifar10/ablation/dm_at_dra-1m  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar10-20m-part1.npz data/synthetic/cifar10-20m-part2.npz --out-dir out/cifar10/ablation/dm_at-20m  # estimate: 4.81 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar10-20m-part1.npz data/synthetic/cifar10-20m-part2.npz --teacher out/teacher-cifar10 --out-dir out/cifar10/ablation/dm_at_dra-20m  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar10-50m-part1.npz data/synthetic/cifar10-50m-part2.npz data/synthetic/cifar10-50m-part3.npz data/synthetic/cifar10-50m-part4.npz --out-dir out/cifar10/ablation/dm_at-50m  # estimate: 4.81 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar10-50m-part1.npz data/synthetic/cifar10-50m-part2.npz data/synthetic/cifar10-50m-part3.npz data/synthetic/cifar10-50m-part4.npz --teacher out/teacher-cifar10 --out-dir out/cifar10/ablation/dm_at_dra-50m  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --precision bf16 --eval-every 10 --synthetic out/cifar10/synthetic --out-dir out/cifar10/ablation/dm_at-own  # estimate: 4.81 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --synthetic out/cifar10/synthetic --teacher out/teacher-cifar10 --out-dir out/cifar10/ablation/dm_at_dra-own  # estimate: 5.10 H100-hours
# Share of synthetic images in a batch (the default, and so dm_at-1m above, is 0.7)
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar10-1m.npz --synthetic-fraction 0.8 --out-dir out/cifar10/ablation/dm_at-fraction-0.8  # estimate: 4.81 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar10-1m.npz --synthetic-fraction 0.8 --teacher out/teacher-cifar10 --out-dir out/cifar10/ablation/dm_at_dra-fraction-0.8  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at.py --dataset cifar10 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar10-1m.npz --synthetic-fraction 0.875 --out-dir out/cifar10/ablation/dm_at-fraction-0.875  # estimate: 4.81 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar10 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar10-1m.npz --synthetic-fraction 0.875 --teacher out/teacher-cifar10 --out-dir out/cifar10/ablation/dm_at_dra-fraction-0.875  # estimate: 5.10 H100-hours

# Ablations are compared by AutoAttack's first two attacks, a fifth of its cost (not in the estimates)
for run in out/cifar10/ablation/*; do
  torchrun --nproc_per_node 8 evaluate.py --dataset cifar10 --attack apgd --checkpoint "$run/best.pt"
done
