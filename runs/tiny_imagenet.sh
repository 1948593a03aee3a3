#!/usr/bin/env bash
# Tiny ImageNet (200 classes, 64 pixels), linf 8/255: the 2 x 2 of diffusion images (DM-AT) and
# diffusion representations (DRA) with WRN-28-10; then ablations.
#
# NOT RUN: the GPU-hours and the files to fetch were lacking. A test parses each line; expect to
# mend settings. Meant for one node of 8 GPUs of 80 GB (H100 or A100); docs/costs.md estimates
# the hours. LAUNCH=python runs on one GPU. Every command resumes or skips what is finished; delete
# the rows that you do not want. One row is one seed: add --seed 1 and another name for the next.
#
# The teacher is NVlabs' ImageNet-64 network. It is class-conditional and was never trained on the
# null label that it gets here (the script warns). And Tiny ImageNet is cut from ImageNet: the
# network may have seen Tiny ImageNet's test images, with their labels. Say so with any result.
# Files to fetch yourself:
#   data/edm-imagenet-64x64-cond-adm.pkl
#     from https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/, CC BY-NC-SA 4.0: not for commercial use
#   data/synthetic/tiny-imagenet-1m.npz
#     DM-AT's generated set; the README of github.com/wzekai99/DM-Improves-AT links it
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=4
out=out/tiny-imagenet
launch=${LAUNCH:-torchrun --nproc_per_node 8}
dm="--synthetic data/synthetic/tiny-imagenet-1m.npz"
dra="--teacher out/teacher-imagenet-64"

# One row: a classifier and AutoAttack on it. row NAME SCRIPT FLAG...
row() {
  $launch $2 --dataset tiny-imagenet --out-dir $out/$1 "${@:3}"
  $launch evaluate.py --dataset tiny-imagenet --attack autoattack --checkpoint $out/$1/best.pt
}
# DM-AT+DRA of a smaller network, validated each tenth epoch, with AutoAttack's first two
# attacks. ablation NAME FLAG...
ablation() {
  $launch train_at_aux.py --dataset tiny-imagenet --out-dir $out/ablation/$1 \
    --model preact-18 --eval-every 10 $dm $dra "${@:2}"
  $launch evaluate.py --dataset tiny-imagenet --attack apgd --checkpoint $out/ablation/$1/best.pt
}

# ---- Teacher
python -m teachers.edm convert data/edm-imagenet-64x64-cond-adm.pkl out/teacher-imagenet-64

# ---- The table: WRN-28-10, the published 1 M set. At the right: clean / AutoAttack of others, %;
# "-": no figure of others is known to us
row at train_at.py --download           # -
row at_dra train_at_aux.py $dra         # -
row dm_at train_at.py $dm               # 65.19 / 31.30 (DM-AT's README)
row dm_at_dra train_at_aux.py $dm $dra  # -

# ---- Ablations: PreAct ResNet-18, the 1 M set; no figure of others is known to us. Compare within
# this part alone. (Beside so small a classifier the teacher is dear.)
# Weight of the alignment term; 0 is DM-AT with the head in place, 1 the reference of the rows below
for weight in 0 0.3 1 3; do ablation weight-$weight --aux-weight $weight; done
# Control: everything of DRA, with the target of another image
ablation shuffled --shuffle-targets
# Noise level (the default is 0.06) and block (the default is dec.16x16_block1)
for sigma in 0.2 0.6; do ablation sigma-$sigma --sigma $sigma; done
for block in dec.8x8_block3 dec.32x32_block1; do ablation block-$block --block $block; done
