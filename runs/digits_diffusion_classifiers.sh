#!/usr/bin/env bash
# Classifiers made of the diffusion model itself, clean and attacked end to end, beside an
# adversarially trained one. After runs/quickstart.sh, whose diffusion model and AT run it uses.
# About a quarter of an hour on two CPU cores; resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
teacher="--teacher out/diffusion-digits"
classifier="--model diffusion-classifier $teacher"
head="--model diffusion-head $teacher --checkpoint out/head-digits.pt"
pgd="--attack pgd --n-restarts 1 --eps 0.05 0.15"

evaluate() { torchrun --nproc_per_node 2 evaluate.py "$@"; }

evaluate $classifier --attack clean --batch-size 50
evaluate $classifier --attack clean --batch-size 50 --keep-classes 3
evaluate $classifier $pgd --n-images 64 --batch-size 32 --sanity-images 2
evaluate $classifier $pgd --fresh-noise --eot 4 --n-images 16 --batch-size 8 --sanity-images 0
python extract_features.py --blocks up_blocks.0.resnets.0 --sigmas 0.1 \
  --save-head out/head-digits.pt
evaluate $head --attack clean
evaluate $head $pgd --n-images 64 --batch-size 32
evaluate --checkpoint out/quickstart/at/best.pt $pgd --n-images 64 --batch-size 32
