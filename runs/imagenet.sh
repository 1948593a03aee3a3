#!/usr/bin/env bash
# ImageNet, linf 4/255, 224 pixels: the 2 x 2 of diffusion images (DM-AT) and diffusion representations (DRA), ConvNeXt-T from clean
# pre-trained weights; then other networks and ablations.
#
# NOT RUN HERE: no such data, weights or GPUs were at hand. Each line was only seen to parse; expect to mend settings.
# Meant for one node of 8 GPUs of 80 GB (H100 or A100), 64 or more CPU cores to decode, and 300 GB of disk for the synthetic set.
# Every command resumes or skips what is finished; run a line alone as you like. Put train/ and val/ of ILSVRC-2012 into data/imagenet.
# Estimates are not measurements: H100-hours of GPU work, FLOP / (35 % of the peak), computed by `python -m runs.costs runs/imagenet.sh`.
# Decoding and augmentation on the CPU are not in them, and may well be what takes the time.
# One row is one seed; add --seed 1 and another --out-dir for the next. "No public anchor": no figure of others is known to us.
#
# Teacher and generator are DiT-XL/2 at 256 pixels, fetched from the hub (its model card has the licence). As a teacher it is dear beside
# a ConvNeXt-T: its VAE encodes each image at 256 pixels, and the two cost several times the adversarial step; the ADM teacher of
# 64 pixels, in the ablations, costs about as much as the step. For that one fetch yourself:
#   data/edm-imagenet-64x64-cond-adm.pkl  https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-imagenet-64x64-cond-adm.pkl (CC BY-NC-SA 4.0)
# The anchors have schedules of their own (50 to 300 epochs); ours is 50. Evaluation is of RobustBench's 5,000 validation images, as the
# anchors': put robustbench/helper_files/imagenet_test_image_ids.txt of its repository or package into data/.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=4

# ---- Synthetic set: as many images as there are real ones, with mild guidance
torchrun --nproc_per_node 8 generate_synthetic.py --dataset imagenet --data-dir data/imagenet --diffusion hub:facebook/DiT-XL-2-256 --guidance-scale 1.5 --n-images 1280000 --batch-size 50 --out-dir out/imagenet/synthetic  # estimate: 261 H100-hours

# ---- The table: ConvNeXt-T
# AT: 72.4 / 48.6 (revisiting-at, Singh et al.; 72.7 / 49.5 with its ConvStem, which torchvision's network has not)
torchrun --nproc_per_node 8 train_at.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --out-dir out/imagenet/at  # estimate: 3.78 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset imagenet --data-dir data/imagenet --image-list data/imagenet_test_image_ids.txt --n-images 5000 --batch-size 50 --attack autoattack --checkpoint out/imagenet/at/best.pt  # estimate: 5.13 H100-hours
# AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --teacher hub:facebook/DiT-XL-2-256 --out-dir out/imagenet/at_dra  # estimate: 24.0 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset imagenet --data-dir data/imagenet --image-list data/imagenet_test_image_ids.txt --n-images 5000 --batch-size 50 --attack autoattack --checkpoint out/imagenet/at_dra/best.pt  # estimate: 5.13 H100-hours
# DM-AT: no public anchor
torchrun --nproc_per_node 8 train_at.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --synthetic out/imagenet/synthetic --synthetic-fraction 0.5 --out-dir out/imagenet/dm_at  # estimate: 3.78 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset imagenet --data-dir data/imagenet --image-list data/imagenet_test_image_ids.txt --n-images 5000 --batch-size 50 --attack autoattack --checkpoint out/imagenet/dm_at/best.pt  # estimate: 5.13 H100-hours
# DM-AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --synthetic out/imagenet/synthetic --synthetic-fraction 0.5 --teacher hub:facebook/DiT-XL-2-256 --out-dir out/imagenet/dm_at_dra  # estimate: 24.0 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset imagenet --data-dir data/imagenet --image-list data/imagenet_test_image_ids.txt --n-images 5000 --batch-size 50 --attack autoattack --checkpoint out/imagenet/dm_at_dra/best.pt  # estimate: 5.13 H100-hours

# ---- Other networks, AT and DM-AT+DRA
# ViT-B/16, AT: 73.3 / 50.0 (revisiting-at, Singh et al.)
torchrun --nproc_per_node 8 train_at.py --dataset imagenet --data-dir data/imagenet --model vit_b_16 --init torchvision --precision bf16 --out-dir out/imagenet/vit_b_16-at  # estimate: 15.1 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset imagenet --data-dir data/imagenet --image-list data/imagenet_test_image_ids.txt --n-images 5000 --batch-size 50 --attack autoattack --checkpoint out/imagenet/vit_b_16-at/best.pt  # estimate: 20.4 H100-hours
# ViT-B/16, DM-AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --model vit_b_16 --init torchvision --precision bf16 --synthetic out/imagenet/synthetic --synthetic-fraction 0.5 --teacher hub:facebook/DiT-XL-2-256 --out-dir out/imagenet/vit_b_16-dm_at_dra  # estimate: 35.2 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset imagenet --data-dir data/imagenet --image-list data/imagenet_test_image_ids.txt --n-images 5000 --batch-size 50 --attack autoattack --checkpoint out/imagenet/vit_b_16-dm_at_dra/best.pt  # estimate: 20.4 H100-hours
# Swin-B, AT: no public anchor
torchrun --nproc_per_node 8 train_at.py --dataset imagenet --data-dir data/imagenet --model swin_b --init torchvision --precision bf16 --out-dir out/imagenet/swin_b-at  # estimate: 13.2 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset imagenet --data-dir data/imagenet --image-list data/imagenet_test_image_ids.txt --n-images 5000 --batch-size 50 --attack autoattack --checkpoint out/imagenet/swin_b-at/best.pt  # estimate: 17.8 H100-hours
# Swin-B, DM-AT+DRA: no public anchor
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --model swin_b --init torchvision --precision bf16 --synthetic out/imagenet/synthetic --synthetic-fraction 0.5 --teacher hub:facebook/DiT-XL-2-256 --out-dir out/imagenet/swin_b-dm_at_dra  # estimate: 33.4 H100-hours
torchrun --nproc_per_node 8 evaluate.py --dataset imagenet --data-dir data/imagenet --image-list data/imagenet_test_image_ids.txt --n-images 5000 --batch-size 50 --attack autoattack --checkpoint out/imagenet/swin_b-dm_at_dra/best.pt  # estimate: 17.8 H100-hours

# ---- Ablations: ConvNeXt-T, 10 epochs; no public anchor in any row. Compare within this part alone
# Weight of the alignment term; 0 is AT with the head in place, 1 the reference of the rows below; and the shuffled control
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --epochs 10 --teacher hub:facebook/DiT-XL-2-256 --aux-weight 0 --out-dir out/imagenet/ablation/weight-0  # estimate: 4.83 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --epochs 10 --teacher hub:facebook/DiT-XL-2-256 --aux-weight 0.3 --out-dir out/imagenet/ablation/weight-0.3  # estimate: 4.83 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --epochs 10 --teacher hub:facebook/DiT-XL-2-256 --aux-weight 1 --out-dir out/imagenet/ablation/weight-1  # estimate: 4.83 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --epochs 10 --teacher hub:facebook/DiT-XL-2-256 --aux-weight 3 --out-dir out/imagenet/ablation/weight-3  # estimate: 4.83 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --epochs 10 --teacher hub:facebook/DiT-XL-2-256 --shuffle-targets --out-dir out/imagenet/ablation/shuffled  # estimate: 4.83 H100-hours
# Noise level (the default is t = 100 of 1,000) and block (the default is transformer_blocks.13)
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --epochs 10 --teacher hub:facebook/DiT-XL-2-256 --sigma 0.1 --out-dir out/imagenet/ablation/sigma-0.1  # estimate: 4.83 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --epochs 10 --teacher hub:facebook/DiT-XL-2-256 --sigma 1 --out-dir out/imagenet/ablation/sigma-1  # estimate: 4.83 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --epochs 10 --teacher hub:facebook/DiT-XL-2-256 --block transformer_blocks.6 --out-dir out/imagenet/ablation/block-6  # estimate: 4.21 H100-hours
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --epochs 10 --teacher hub:facebook/DiT-XL-2-256 --block transformer_blocks.20 --out-dir out/imagenet/ablation/block-20  # estimate: 5.45 H100-hours
# Teacher: ADM at 64 pixels (never trained on the null label: the script warns)
python -m common.edm convert data/edm-imagenet-64x64-cond-adm.pkl out/teacher-imagenet-64
torchrun --nproc_per_node 8 train_at_aux.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --epochs 10 --teacher out/teacher-imagenet-64 --out-dir out/imagenet/ablation/teacher-adm  # estimate: 1.69 H100-hours
# Share of synthetic images in a batch, DM-AT
torchrun --nproc_per_node 8 train_at.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --epochs 10 --synthetic out/imagenet/synthetic --synthetic-fraction 0.3 --out-dir out/imagenet/ablation/dm_at-fraction-0.3  # estimate: 0.756 H100-hours
torchrun --nproc_per_node 8 train_at.py --dataset imagenet --data-dir data/imagenet --init torchvision --precision bf16 --epochs 10 --synthetic out/imagenet/synthetic --synthetic-fraction 0.7 --out-dir out/imagenet/ablation/dm_at-fraction-0.7  # estimate: 0.756 H100-hours

# Ablations are compared by AutoAttack's first two attacks, a fifth of its cost (not in the estimates)
for run in out/imagenet/ablation/*; do
  torchrun --nproc_per_node 8 evaluate.py --dataset imagenet --data-dir data/imagenet --image-list data/imagenet_test_image_ids.txt --n-images 5000 --batch-size 50 --attack apgd --checkpoint "$run/best.pt"
done
