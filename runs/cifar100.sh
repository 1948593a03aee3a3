#!/usr/bin/env bash
# CIFAR-100, linf 8/255: the 2 x 2 of diffusion images (DM-AT) and diffusion representations (DRA)
# with WRN-28-10; then larger runs, ViT-B/2 and ablations.
#
# NOT RUN: the GPU-hours and the files to fetch were lacking. A test parses each line; expect to
# mend settings. Meant for one node of 8 GPUs of 80 GB (H100 or A100); docs/costs.md estimates
# the hours. LAUNCH=python runs on one GPU. Every command resumes or skips what is finished; delete
# the rows that you do not want. One row is one seed: add --seed 1 and another name for the next.
#
# NVlabs has no CIFAR-100 network. The teacher is CIFAR-10's unconditional one: another data set of
# the same kind of photographs, and none of CIFAR-100's labels in it. Files to fetch yourself:
#   data/edm-cifar10-32x32-uncond-vp.pkl
#     from https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/, CC BY-NC-SA 4.0: not for commercial use
#   data/synthetic/cifar100-1m.npz, cifar100-50m-part1.npz to 4
#     DM-AT's generated sets; the README of github.com/wzekai99/DM-Improves-AT links them
#     (cifar100/1m.npz, 50m_part1.npz, ...)
#   data/edm-cifar100-cond-32x32-cond-vp.pkl, for the last part alone
#     the network that DM-AT's authors trained, linked in edm/README.md of the same repository.
#     Whether teachers/edm.py reads it is not tried.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=4
out=out/cifar100
launch=${LAUNCH:-torchrun --nproc_per_node 8}

# One row: a classifier and AutoAttack on it. row NAME SCRIPT FLAG...
row() {
  $launch $2 --dataset cifar100 --out-dir $out/$1 "${@:3}"
  $launch evaluate.py --dataset cifar100 --attack autoattack --checkpoint $out/$1/best.pt
}
# The same, validated each tenth epoch, with AutoAttack's first two attacks.
ablation() {
  $launch $2 --dataset cifar100 --out-dir $out/ablation/$1 --eval-every 10 "${@:3}"
  $launch evaluate.py --dataset cifar100 --attack apgd --checkpoint $out/ablation/$1/best.pt
}

# ---- Teacher
python -m teachers.edm convert data/edm-cifar10-32x32-uncond-vp.pkl out/teacher-cifar10

sets=data/synthetic/cifar100
dm_1m="--synthetic $sets-1m.npz"
dm_50m="--synthetic $sets-50m-part1.npz $sets-50m-part2.npz $sets-50m-part3.npz $sets-50m-part4.npz"
dra="--teacher out/teacher-cifar10"

# ---- The table: WRN-28-10, the published 1 M set. At the right: clean / AutoAttack of others, %;
# "-": no figure of others is known to us
row at train_at.py --download              # -
row at_dra train_at_aux.py $dra            # -
row dm_at train_at.py $dm_1m               # 68.06 / 35.65 (DM-AT's row in the README of DKL)
row dm_at_dra train_at_aux.py $dm_1m $dra  # -

# ---- Larger runs. The anchors had batch sizes and numbers of epochs of their own (argtxt beside
# DM-AT's checkpoints), not set here
share="--synthetic-fraction 0.8"
large="--model wrn-70-16"
row dm_at-50m train_at.py $dm_50m $share  # 72.58 / 38.83 (DM-AT's README)
row dm_at_dra-50m train_at_aux.py $dm_50m $share $dra  # -
row wrn-70-16-dm_at-50m train_at.py $large $dm_50m $share  # 75.22 / 42.67 (DM-AT's README)
row wrn-70-16-dm_at_dra-50m train_at_aux.py $large $dm_50m $share $dra  # -

# ---- ViT-B/2: the recipe is ours; no figure of others is known to us in any row below
vit="--model vit-b-2 --eval-every 10"
row vit-b-2-at train_at.py $vit
row vit-b-2-at_dra train_at_aux.py $vit $dra
row vit-b-2-dm_at train_at.py $vit $dm_1m
row vit-b-2-dm_at_dra train_at_aux.py $vit $dm_1m $dra

# ---- Ablations: WRN-28-10. Compare within this part alone
# Weight of the alignment term; 0 is AT with the head in place, 1 the reference of the rows below
for weight in 0 0.1 0.3 1 3 10; do
  ablation weight-$weight train_at_aux.py $dra --aux-weight $weight
done
# Control: everything of DRA, with the target of another image
ablation shuffled train_at_aux.py $dra --shuffle-targets
# Teacher: CIFAR-10's DDPM, fetched from the hub
ablation teacher-ddpm train_at_aux.py --teacher hub:google/ddpm-cifar10-32
# Share of synthetic images in a batch: the default 0.7, then 0.8
ablation dm_at_dra-1m train_at_aux.py $dm_1m $dra
ablation dm_at_dra-fraction-0.8 train_at_aux.py $dm_1m --synthetic-fraction 0.8 $dra

# ---- With DM-AT's own CIFAR-100 network: as teacher (class-conditional, never trained on the null
# label: the script warns), and for a set of our own: 5 M images in 25 steps, the best fifth of each
# class kept
python -m teachers.edm convert data/edm-cifar100-cond-32x32-cond-vp.pkl out/edm-cifar100-cond
ablation teacher-cifar100 train_at_aux.py --teacher out/edm-cifar100-cond
$launch train_at.py --dataset cifar100 --loss standard --eval-n-steps 1 --out-dir $out/standard
$launch generate_synthetic.py --dataset cifar100 --diffusion out/edm-cifar100-cond --n-steps 25 \
  --n-images 5000000 --shard-size 25000 \
  --keep-fraction 0.2 --classifier $out/standard/best.pt --out-dir $out/synthetic
ablation dm_at_dra-own train_at_aux.py --synthetic $out/synthetic $dra
