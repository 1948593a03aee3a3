#!/usr/bin/env bash
# CIFAR-10, linf 8/255: the 2 x 2 of diffusion images (DM-AT) and diffusion representations (DRA)
# with WRN-28-10; then larger runs, ViT-B/2, and one line per ablation.
#
# NOT RUN: the GPU-hours and the files to fetch were lacking. A test parses each line; expect to
# mend settings. Meant for one node of 8 GPUs of 80 GB (H100 or A100); docs/costs.md estimates
# the hours. LAUNCH=python runs on one GPU. Every command resumes or skips what is finished; delete
# the rows that you do not want. One row is one seed: add --seed 1 and another name for the next.
#
# Files to fetch yourself:
#   data/edm-cifar10-32x32-uncond-vp.pkl, data/edm-cifar10-32x32-cond-vp.pkl
#     from https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/, CC BY-NC-SA 4.0: not for commercial use
#   data/synthetic/cifar10-1m.npz, cifar10-20m-part1.npz and 2, cifar10-50m-part1.npz to 4
#     DM-AT's generated sets; the README of github.com/wzekai99/DM-Improves-AT links them
#     (cifar10/1m.npz, 20m_part1.npz, ...)
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=4
out=out/cifar10
launch=${LAUNCH:-torchrun --nproc_per_node 8}

# One row: a classifier and AutoAttack on it. row NAME SCRIPT FLAG...
row() {
  $launch $2 --dataset cifar10 --out-dir $out/$1 "${@:3}"
  $launch evaluate.py --dataset cifar10 --attack autoattack --checkpoint $out/$1/best.pt
}
# The same, validated each tenth epoch, with AutoAttack's first two attacks.
ablation() {
  $launch $2 --dataset cifar10 --out-dir $out/ablation/$1 --eval-every 10 "${@:3}"
  $launch evaluate.py --dataset cifar10 --attack apgd --checkpoint $out/ablation/$1/best.pt
}

# ---- Teacher (unconditional: no label can leak)
python -m teachers.edm convert data/edm-cifar10-32x32-uncond-vp.pkl out/teacher-cifar10
# Which block and noise level know the class? (linear probe on held-out training images)
blocks="enc.16x16_block3 dec.8x8_in1 dec.8x8_block4 dec.16x16_block1 dec.16x16_block4"
$launch extract_features.py --dataset cifar10 --download --val-size 1024 --diffusion out/teacher-cifar10 \
  --blocks $blocks dec.32x32_block1 --sigmas 0.02 0.06 0.2 0.6 --probe --out-dir $out/features

sets=data/synthetic/cifar10
dm_1m="--synthetic $sets-1m.npz"
dm_20m="--synthetic $sets-20m-part1.npz $sets-20m-part2.npz"
dm_50m="--synthetic $sets-50m-part1.npz $sets-50m-part2.npz $sets-50m-part3.npz $sets-50m-part4.npz"
dm_own="--synthetic $out/synthetic"
dra="--teacher out/teacher-cifar10"

# ---- The table: WRN-28-10, the published 1 M set. At the right: clean / AutoAttack of others, %;
# "-": no figure of others is known to us
row at train_at.py                         # -
row at_dra train_at_aux.py $dra            # -
row dm_at train_at.py $dm_1m               # 91.12 / 63.35 (DM-AT's row in the README of DKL)
row dm_at_dra train_at_aux.py $dm_1m $dra  # -

# ---- Larger runs. The anchors had batch sizes and numbers of epochs of their own (argtxt beside
# DM-AT's checkpoints), not set here
share="--synthetic-fraction 0.8"
large="--model wrn-70-16"
row dm_at-20m train_at.py $dm_20m $share  # 92.44 / 67.31 (DM-AT's README, RobustBench)
row dm_at_dra-20m train_at_aux.py $dm_20m $share $dra  # -
row wrn-70-16-dm_at-50m train_at.py $large $dm_50m $share  # 93.25 / 70.69 (both as above)
row wrn-70-16-dm_at_dra-50m train_at_aux.py $large $dm_50m $share $dra  # -

# ---- ViT-B/2: the recipe is ours; no figure of others is known to us in any row below
vit="--model vit-b-2 --eval-every 10"
row vit-b-2-at train_at.py $vit
row vit-b-2-at_dra train_at_aux.py $vit $dra
row vit-b-2-dm_at train_at.py $vit $dm_1m
row vit-b-2-dm_at_dra train_at_aux.py $vit $dm_1m $dra

# ---- Ablations: WRN-28-10. Compare within this part alone
# Weight of the alignment term; 0 is AT with the head in place (train_at.py's very weights), 1 the
# reference of all rows below
for weight in 0 0.1 0.3 1 3 10; do
  ablation weight-$weight train_at_aux.py $dra --aux-weight $weight
done
# Control: everything of DRA, with the target of another image
ablation shuffled train_at_aux.py $dra --shuffle-targets
# Noise level (the default is 0.06)
for sigma in 0.02 0.2 0.6; do ablation sigma-$sigma train_at_aux.py $dra --sigma $sigma; done
# Block (the default is dec.16x16_block1)
for block in enc.16x16_block3 dec.8x8_in1 dec.8x8_block4 dec.16x16_block4 dec.32x32_block1; do
  ablation block-$block train_at_aux.py $dra --block $block
done
# Which images' features are aligned (the default is adv)
for align in clean both; do ablation align-$align train_at_aux.py $dra --align $align; done
# Another teacher: DDPM, fetched from the hub
ablation teacher-ddpm train_at_aux.py --teacher hub:google/ddpm-cifar10-32
# Another loss: PGD-AT without and with DRA
ablation pgd-at train_at.py --loss pgd
ablation pgd-at_dra train_at_aux.py --loss pgd $dra
# Amount of synthetic data, without and with DRA: 1 M, 20 M, 50 M at the same number of steps
ablation dm_at-1m train_at.py $dm_1m
ablation dm_at_dra-1m train_at_aux.py $dm_1m $dra
ablation dm_at-20m train_at.py $dm_20m
ablation dm_at_dra-20m train_at_aux.py $dm_20m $dra
ablation dm_at-50m train_at.py $dm_50m
ablation dm_at_dra-50m train_at_aux.py $dm_50m $dra
# A set of our own in place of the published 1 M: 5 M images, the best fifth of each class kept
python -m teachers.edm convert data/edm-cifar10-32x32-cond-vp.pkl out/edm-cifar10-cond
$launch train_at.py --dataset cifar10 --loss standard --eval-n-steps 1 --out-dir $out/standard
$launch generate_synthetic.py --dataset cifar10 --diffusion out/edm-cifar10-cond --n-steps 20 \
  --n-images 5000000 --shard-size 25000 \
  --keep-fraction 0.2 --classifier $out/standard/best.pt --out-dir $out/synthetic
ablation dm_at-own train_at.py $dm_own
ablation dm_at_dra-own train_at_aux.py $dm_own $dra
# Share of synthetic images in a batch (the default, and so dm_at-1m above, is 0.7)
for share in 0.8 0.875; do
  ablation dm_at-fraction-$share train_at.py $dm_1m --synthetic-fraction $share
  ablation dm_at_dra-fraction-$share train_at_aux.py $dm_1m --synthetic-fraction $share $dra
done
