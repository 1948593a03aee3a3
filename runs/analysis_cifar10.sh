#!/usr/bin/env bash
# runs/analysis.sh on CIFAR-10 with 5,000 labels, five seeds. After runs/cifar10_small.sh, whose
# classifiers and teacher it uses; standard ones are trained here. About an hour on two CPU cores;
# every command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
out=out/analysis-cifar10
cifar="--dataset cifar10 --data-dir ${DATA:-data} --precision bf16 --n-train 5000"
recipe="--model wrn-10-2 --batch-size 64 --lr 0.2 --clip-norm 5 --warmup-fraction 0.2
  --epoch-images 3200 --epochs 20 --eval-every 4 --eval-n-steps 10"

models=""
for seed in 0 1 2 3 4; do
  python train_at.py $cifar $recipe --loss standard --seed $seed --out-dir $out/standard-$seed
  models="$models --model standard=$out/standard-$seed/best.pt"
done
for kind in at at_dra dm_at dm_at_dra; do
  for seed in 0 1 2 3 4; do
    models="$models --model $kind=out/evidence/cifar-5000/$kind/$seed/best.pt"
  done
done
torchrun --nproc_per_node 2 analyze.py $cifar $models --teacher docs/cifar10-teacher \
  --block up_blocks.1.resnets.1 --sigma 0.1 --out-dir $out
python -m analysis.claims --analysis $out
