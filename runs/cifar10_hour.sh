#!/usr/bin/env bash
# CIFAR-10 in an hour of one H100: teacher and images from nothing, the 2 x 2 with WRN-16-4 and all
# labels, AutoAttack standard on 1,000 test images; one seed.
#
# NOT RUN as a whole: its lines are tested at toy size. The minutes are estimates, the rows "The hour"
# of docs/costs.md: counted FLOP over speeds of an H100. For those of your own machine, add --check
# to a line that trains. DRA's block and sigma are chosen by analogy with runs/cifar10_small.sh, not
# probed. Every command resumes; add --seed 1 and other names for the next seed.
# CIFAR-10 lies in data/, as the archive or as class folders; DATA=DIR names another place.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=4
out=out/cifar10-hour
cifar="--dataset cifar10 --data-dir ${DATA:-data}"
teacher=$out/diffusion
images=$out/synthetic
recipe="--model wrn-16-4 --epochs 40 --eval-every 4 --eval-n-steps 20"
dm="--synthetic $images"
dra="--teacher $teacher --block up_blocks.1.resnets.2 --sigma 0.1"

# ---- 12 minutes: 34 M parameters, 10,000 steps of 256 images, 34 GFLOP an image
python train_diffusion.py $cifar --channels 128 256 256 256 --layers-per-block 2 \
  --batch-size 256 --train-steps 10000 --lr 5e-4 --warmup-steps 1000 --ema-decay 0.9995 \
  --eval-every 1000 --out-dir $teacher
# ---- 4 minutes: 100,000 images of 12 steps, which are 23 passes of 11 GFLOP
python generate_synthetic.py $cifar --diffusion $teacher --n-images 100000 --n-steps 12 \
  --shard-size 10000 --batch-size 1000 --out-dir $images

# ---- 7 minutes each, 8 with DRA: 40 epochs of 50,000 images, 20 GFLOP each and 4 of the teacher
# ---- and 4 minutes each at most: AutoAttack. A cell: cell NAME SCRIPT FLAG...
cell() {
  python $2 $cifar $recipe --out-dir $out/$1 "${@:3}"
  python evaluate.py $cifar --attack autoattack --n-images 1000 --batch-size 1000 \
    --checkpoint $out/$1/best.pt
}
cell at train_at.py
cell at_dra train_at_aux.py $dra
cell dm_at train_at.py $dm
cell dm_at_dra train_at_aux.py $dm $dra
