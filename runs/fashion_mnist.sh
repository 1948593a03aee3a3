#!/usr/bin/env bash
# Fashion-MNIST, real 28 x 28 images, on two CPU cores in about an hour: the 2 x 2 at a small budget, one seed, from nothing.
# The classifiers train on 6,400 real images (500 steps of 128); the diffusion model on all 58,976 that are not held out, so
# that its images and representations know more than AT sees. Needs Debian's package dataset-fashion-mnist, or --download.
# Run: the rows in README come from these commands. Every command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES=  # the table is of CPUs; two processes would need two GPUs
export OMP_NUM_THREADS=1

# The diffusion model (600 k parameters, about 20 minutes on one core) and 5,000 images.
python train_diffusion.py --dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist --val-size 1024 --channels 24 48 48 --batch-size 64 --train-steps 1500 --eval-every 300
torchrun --nproc_per_node 2 generate_synthetic.py --dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist --val-size 1024 --n-images 5000 --shard-size 500 --n-steps 10

# AT, AT+DRA, DM-AT, DM-AT+DRA.
python train_at.py --dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist --n-train 6400 --out-dir out/fashion/at
python train_at_aux.py --dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist --n-train 6400 --out-dir out/fashion/at_dra
python train_at.py --dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist --n-train 6400 --synthetic out/synthetic-fashion-mnist --out-dir out/fashion/dm_at
python train_at_aux.py --dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist --n-train 6400 --synthetic out/synthetic-fashion-mnist --out-dir out/fashion/dm_at_dra

# APGD-CE+T (an upper bound on robust accuracy) on the first 500 test images.
torchrun --nproc_per_node 2 evaluate.py --dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist --attack apgd --n-images 500 --checkpoint out/fashion/at/best.pt
torchrun --nproc_per_node 2 evaluate.py --dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist --attack apgd --n-images 500 --checkpoint out/fashion/at_dra/best.pt
torchrun --nproc_per_node 2 evaluate.py --dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist --attack apgd --n-images 500 --checkpoint out/fashion/dm_at/best.pt
torchrun --nproc_per_node 2 evaluate.py --dataset fashion-mnist --data-dir /usr/share/datasets/fashion-mnist --attack apgd --n-images 500 --checkpoint out/fashion/dm_at_dra/best.pt
