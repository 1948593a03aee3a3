#!/usr/bin/env bash
# CIFAR-100, linf 8/255: the 2 x 2 of diffusion images (DM-AT) and diffusion representations (DRA), WRN-28-10; then larger runs and ablations.
#
# NOT RUN HERE: no such data, weights or GPUs were at hand. Each line was only seen to parse; expect to mend settings.
# Meant for one node of 8 GPUs of 80 GB (H100 or A100). Every command resumes or skips what is finished; run a line alone as you like.
# Estimates are not measurements: H100-hours of GPU work, FLOP / (35 % of the peak), computed by `python -m runs.costs runs/cifar100.sh`.
# One row is one seed; add --seed 1 and another --out-dir for the next. "No public anchor": no figure of others is known to us.
#
# NVlabs has no CIFAR-100 network. The teacher is CIFAR-10's unconditional one: another data set of the same kind of photographs, and
# none of CIFAR-100's labels in it. Files to fetch yourself:
#   data/edm-cifar10-32x32-uncond-vp.pkl  https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl (CC BY-NC-SA 4.0)
#   data/synthetic/cifar100-1m.npz, cifar100-50m-part1.npz to 4
#     DM-AT's generated sets; the README of github.com/wzekai99/DM-Improves-AT links them (cifar100/1m.npz, 50m_part1.npz, ...).
#   data/edm-cifar100-cond-32x32-cond-vp.pkl, for the last part alone
#     the network that DM-AT's authors trained, linked in edm/README.md of the same repository. Whether common/edm.py reads it is not tried.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=4

# ---- Teacher
python -m common.edm convert data/edm-cifar10-32x32-uncond-vp.pkl out/teacher-cifar10

# ---- The table: WRN-28-10, the published 1 M set
# AT: no public anchor
torchrun --nproc_per_node 8 train_at.py --dataset cifar100 --download --out-dir out/cifar100/at  # estimate: 69.0 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack autoattack --checkpoint out/cifar100/at/best.pt  # estimate: 12.1 H100-hours
# AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --teacher out/teacher-cifar10 --out-dir out/cifar100/at_dra  # estimate: 73.3 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack autoattack --checkpoint out/cifar100/at_dra/best.pt  # estimate: 12.1 H100-hours
# DM-AT: 68.06 / 35.65 (DM-AT's row in the README of DKL)
torchrun --nproc_per_node 8 train_at.py --dataset cifar100 --synthetic data/synthetic/cifar100-1m.npz --out-dir out/cifar100/dm_at  # estimate: 69.0 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack autoattack --checkpoint out/cifar100/dm_at/best.pt  # estimate: 12.1 H100-hours
# DM-AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --synthetic data/synthetic/cifar100-1m.npz --teacher out/teacher-cifar10 --out-dir out/cifar100/dm_at_dra  # estimate: 73.3 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack autoattack --checkpoint out/cifar100/dm_at_dra/best.pt  # estimate: 12.1 H100-hours

# ---- Larger runs. The anchors had batch sizes and numbers of epochs of their own (argtxt beside DM-AT's checkpoints), not set here
# WRN-28-10, 50 M, DM-AT: 72.58 / 38.83 (DM-AT's README)
torchrun --nproc_per_node 8 train_at.py --dataset cifar100 --synthetic data/synthetic/cifar100-50m-part1.npz data/synthetic/cifar100-50m-part2.npz data/synthetic/cifar100-50m-part3.npz data/synthetic/cifar100-50m-part4.npz --synthetic-fraction 0.8 --out-dir out/cifar100/dm_at-50m  # estimate: 69.0 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack autoattack --checkpoint out/cifar100/dm_at-50m/best.pt  # estimate: 12.1 H100-hours
# WRN-28-10, 50 M, DM-AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --synthetic data/synthetic/cifar100-50m-part1.npz data/synthetic/cifar100-50m-part2.npz data/synthetic/cifar100-50m-part3.npz data/synthetic/cifar100-50m-part4.npz --synthetic-fraction 0.8 --teacher out/teacher-cifar10 --out-dir out/cifar100/dm_at_dra-50m  # estimate: 73.3 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack autoattack --checkpoint out/cifar100/dm_at_dra-50m/best.pt  # estimate: 12.1 H100-hours
# WRN-70-16, 50 M, DM-AT: 75.22 / 42.67 (DM-AT's README)
torchrun --nproc_per_node 8 train_at.py --dataset cifar100 --model wrn-70-16 --synthetic data/synthetic/cifar100-50m-part1.npz data/synthetic/cifar100-50m-part2.npz data/synthetic/cifar100-50m-part3.npz data/synthetic/cifar100-50m-part4.npz --synthetic-fraction 0.8 --out-dir out/cifar100/wrn-70-16-dm_at-50m  # estimate: 510 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack autoattack --checkpoint out/cifar100/wrn-70-16-dm_at-50m/best.pt  # estimate: 89.3 H100-hours
# WRN-70-16, 50 M, DM-AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --model wrn-70-16 --synthetic data/synthetic/cifar100-50m-part1.npz data/synthetic/cifar100-50m-part2.npz data/synthetic/cifar100-50m-part3.npz data/synthetic/cifar100-50m-part4.npz --synthetic-fraction 0.8 --teacher out/teacher-cifar10 --out-dir out/cifar100/wrn-70-16-dm_at_dra-50m  # estimate: 515 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack autoattack --checkpoint out/cifar100/wrn-70-16-dm_at_dra-50m/best.pt  # estimate: 89.3 H100-hours

# ---- ViT-B/2: the recipe is ours; no public anchor in any row
torchrun --nproc_per_node 8 train_at.py --dataset cifar100 --model vit-b-2 --precision bf16 --eval-every 10 --out-dir out/cifar100/vit-b-2-at  # estimate: 21.6 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack autoattack --checkpoint out/cifar100/vit-b-2-at/best.pt  # estimate: 53.6 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --model vit-b-2 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --out-dir out/cifar100/vit-b-2-at_dra  # estimate: 21.9 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack autoattack --checkpoint out/cifar100/vit-b-2-at_dra/best.pt  # estimate: 53.6 H100-hours
torchrun --nproc_per_node 8 train_at.py --dataset cifar100 --model vit-b-2 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar100-1m.npz --out-dir out/cifar100/vit-b-2-dm_at  # estimate: 21.6 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack autoattack --checkpoint out/cifar100/vit-b-2-dm_at/best.pt  # estimate: 53.6 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --model vit-b-2 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar100-1m.npz --teacher out/teacher-cifar10 --out-dir out/cifar100/vit-b-2-dm_at_dra  # estimate: 21.9 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack autoattack --checkpoint out/cifar100/vit-b-2-dm_at_dra/best.pt  # estimate: 53.6 H100-hours

# ---- Ablations: WRN-28-10 in bf16, validated each tenth epoch; no public anchor in any row. Compare within this part alone
# Weight of the alignment term; 0 is AT with the head in place, 1 the reference of the rows below; and the shuffled control
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --aux-weight 0 --out-dir out/cifar100/ablation/weight-0  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --aux-weight 0.1 --out-dir out/cifar100/ablation/weight-0.1  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --aux-weight 0.3 --out-dir out/cifar100/ablation/weight-0.3  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --aux-weight 1 --out-dir out/cifar100/ablation/weight-1  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --aux-weight 3 --out-dir out/cifar100/ablation/weight-3  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --aux-weight 10 --out-dir out/cifar100/ablation/weight-10  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --precision bf16 --eval-every 10 --teacher out/teacher-cifar10 --shuffle-targets --out-dir out/cifar100/ablation/shuffled  # estimate: 5.10 H100-hours
# Teacher: CIFAR-10's DDPM, fetched from the hub
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --precision bf16 --eval-every 10 --teacher hub:google/ddpm-cifar10-32 --out-dir out/cifar100/ablation/teacher-ddpm  # estimate: 4.88 H100-hours
# Share of synthetic images in a batch: the default 0.7, then 0.8
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar100-1m.npz --teacher out/teacher-cifar10 --out-dir out/cifar100/ablation/dm_at_dra-1m  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --precision bf16 --eval-every 10 --synthetic data/synthetic/cifar100-1m.npz --synthetic-fraction 0.8 --teacher out/teacher-cifar10 --out-dir out/cifar100/ablation/dm_at_dra-fraction-0.8  # estimate: 5.10 H100-hours

# ---- With DM-AT's own CIFAR-100 network: as teacher (class-conditional, never trained on the null label: the script warns), and
# for a set of our own: 5 M images in 25 steps, the best fifth by class kept
python -m common.edm convert data/edm-cifar100-cond-32x32-cond-vp.pkl out/edm-cifar100-cond
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --precision bf16 --eval-every 10 --teacher out/edm-cifar100-cond --out-dir out/cifar100/ablation/teacher-cifar100  # estimate: 5.10 H100-hours
torchrun --nproc_per_node 8 train_at.py --dataset cifar100 --loss standard --eval-n-steps 1 --out-dir out/cifar100/standard  # estimate: 7.68 H100-hours
torchrun --nproc_per_node 8 generate_synthetic.py --dataset cifar100 --diffusion out/edm-cifar100-cond --n-images 5000000 --shard-size 25000 --n-steps 25 --keep-fraction 0.2 --classifier out/cifar100/standard/best.pt --out-dir out/cifar100/synthetic  # estimate: 124 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset cifar100 --precision bf16 --eval-every 10 --synthetic out/cifar100/synthetic --teacher out/teacher-cifar10 --out-dir out/cifar100/ablation/dm_at_dra-own  # estimate: 5.10 H100-hours

# Ablations are compared by AutoAttack's first two attacks, a fifth of its cost (not in the estimates)
for run in out/cifar100/ablation/*; do
  torchrun --nproc_per_node 8 evaluate.py --dataset cifar100 --attack apgd --checkpoint "$run/best.pt"
done
