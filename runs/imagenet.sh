#!/usr/bin/env bash
# ImageNet, linf 4/255, 224 pixels: the 2 x 2 of diffusion images (DM-AT) and diffusion
# representations (DRA) with ConvNeXt-T from clean pre-trained weights; then other networks and
# ablations.
#
# NOT RUN: the GPU-hours and the files to fetch were lacking. A test parses each line; expect to
# mend settings. Meant for one node of 8 GPUs of 80 GB (H100 or A100), 64 or more CPU cores to
# decode, and 300 GB of disk for the synthetic set; docs/costs.md estimates the hours. Decoding and
# augmentation on the CPU are not in them, and may well be what takes the time. LAUNCH=python runs on
# one GPU. Every command resumes or skips what is finished; delete the rows that you do not want. One
# row is one seed: add --seed 1 and another name for the next.
#
# Put train/ and val/ of ILSVRC-2012 into data/imagenet. The teacher is JiT-B/16 at 256 pixels, which
# needs no VAE; every second image has a target (docs/costs.md). The generator is DiT-XL/2, fetched
# from the hub, CC BY-NC 4.0: not for commercial use. (JiT-B/16 or EDM2 in its place: give --diffusion
# out/jit-b-16, or see docs/recipes.md for EDM2 with its guide.) The ADM teacher of 64 pixels, in the ablations,
# has a target for every fifth image.
# Files to fetch yourself:
#   data/jit-b-16/checkpoint-last.pth
#     JiT-B/16, by the links of github.com/LTH14/JiT, MIT licence
#   data/edm-imagenet-64x64-cond-adm.pkl, for that ablation alone
#     from https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/, CC BY-NC-SA 4.0: not for commercial use
#   data/imagenet_test_image_ids.txt
#     robustbench/helper_files/imagenet_test_image_ids.txt of RobustBench's repository or package:
#     its 5,000 validation images, on which the anchors were evaluated too
# The anchors have schedules of their own (50 to 300 epochs); ours is 50.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=4
out=out/imagenet
launch=${LAUNCH:-torchrun --nproc_per_node 8}
imagenet="--dataset imagenet --data-dir data/imagenet"
train="$imagenet --init torchvision"
attack="$imagenet --image-list data/imagenet_test_image_ids.txt --n-images 5000 --batch-size 50"

# One row: a classifier and AutoAttack on it. row NAME SCRIPT FLAG...
row() {
  $launch $2 $train --out-dir $out/$1 "${@:3}"
  $launch evaluate.py $attack --attack autoattack --checkpoint $out/$1/best.pt
}
# The same of 10 epochs, with AutoAttack's first two attacks.
ablation() {
  $launch $2 $train --epochs 10 --out-dir $out/ablation/$1 "${@:3}"
  $launch evaluate.py $attack --attack apgd --checkpoint $out/ablation/$1/best.pt
}

# ---- Teacher
python -m teachers.jit convert data/jit-b-16/checkpoint-last.pth out/jit-b-16

# ---- Synthetic set: as many images as there are real ones, with mild guidance
$launch generate_synthetic.py $imagenet --diffusion hub:facebook/DiT-XL-2-256 \
  --guidance-scale 1.5 --n-images 1280000 --batch-size 50 --out-dir $out/synthetic

dm="--synthetic $out/synthetic --synthetic-fraction 0.5"
dra="--teacher out/jit-b-16"

# ---- The table: ConvNeXt-T. At the right: clean / AutoAttack of others, %; "-": no figure of
# others is known to us. (AT with a ConvStem, which torchvision's network has not: 72.7 / 49.5.)
row at train_at.py                      # 72.4 / 48.6 (revisiting-at, Singh et al.)
row at_dra train_at_aux.py $dra         # -
row dm_at train_at.py $dm               # -
row dm_at_dra train_at_aux.py $dm $dra  # -

# ---- Other networks, AT and DM-AT+DRA
row vit_b_16-at train_at.py --model vit_b_16  # 73.3 / 50.0 (revisiting-at, Singh et al.)
row vit_b_16-dm_at_dra train_at_aux.py --model vit_b_16 $dm $dra  # -
row swin_b-at train_at.py --model swin_b  # -
row swin_b-dm_at_dra train_at_aux.py --model swin_b $dm $dra  # -

# ---- Ablations: ConvNeXt-T; no figure of others is known to us. Compare within this part alone
# Weight of the alignment term; 0 is AT with the head in place, 1 the reference of the rows below
for weight in 0 0.3 1 3; do ablation weight-$weight train_at_aux.py $dra --aux-weight $weight; done
# Control: everything of DRA, with the target of another image
ablation shuffled train_at_aux.py $dra --shuffle-targets
# Noise level (the default is 1) and block (the default is blocks.5)
for sigma in 0.3 3; do ablation sigma-$sigma train_at_aux.py $dra --sigma $sigma; done
for n in 2 8; do ablation block-$n train_at_aux.py $dra --block blocks.$n; done
# Images that have a target (the default is every second)
for k in 1 4; do ablation every-$k train_at_aux.py $dra --teacher-every $k; done
# Teacher: JiT and ADM at 64 pixels (never trained on the null label: the script warns), both with a
# target for every fifth image
python -m teachers.edm convert data/edm-imagenet-64x64-cond-adm.pkl out/teacher-imagenet-64
ablation every-5 train_at_aux.py $dra --teacher-every 5
ablation teacher-adm train_at_aux.py --teacher out/teacher-imagenet-64 --teacher-every 5
# Share of synthetic images in a batch, DM-AT
for share in 0.3 0.7; do
  ablation dm_at-fraction-$share train_at.py --synthetic $out/synthetic --synthetic-fraction $share
done
