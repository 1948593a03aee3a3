#!/usr/bin/env bash
# Classifiers made of the diffusion model itself, clean and attacked end to end, beside an adversarially trained one.
# After runs/quickstart.sh, whose diffusion model and AT run it uses. About a quarter of an hour on two CPU cores; resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
torchrun --nproc_per_node 2 evaluate.py --model diffusion-classifier --teacher out/diffusion-digits --attack clean --batch-size 50
torchrun --nproc_per_node 2 evaluate.py --model diffusion-classifier --teacher out/diffusion-digits --keep-classes 3 --attack clean --batch-size 50
torchrun --nproc_per_node 2 evaluate.py --model diffusion-classifier --teacher out/diffusion-digits --attack pgd --n-restarts 1 --eps 0.05 0.15 --n-images 64 --batch-size 32 --sanity-images 2
torchrun --nproc_per_node 2 evaluate.py --model diffusion-classifier --teacher out/diffusion-digits --fresh-noise --attack pgd --n-restarts 1 --eot 4 --eps 0.05 0.15 --n-images 16 --batch-size 8 --sanity-images 0
python extract_features.py --blocks up_blocks.0.resnets.0 --sigmas 0.1 --save-head out/head-digits.pt
torchrun --nproc_per_node 2 evaluate.py --model diffusion-head --teacher out/diffusion-digits --checkpoint out/head-digits.pt --attack clean
torchrun --nproc_per_node 2 evaluate.py --model diffusion-head --teacher out/diffusion-digits --checkpoint out/head-digits.pt --attack pgd --n-restarts 1 --eps 0.05 0.15 --n-images 64 --batch-size 32
torchrun --nproc_per_node 2 evaluate.py --checkpoint out/quickstart/at/best.pt --attack pgd --n-restarts 1 --eps 0.05 0.15 --n-images 64 --batch-size 32
