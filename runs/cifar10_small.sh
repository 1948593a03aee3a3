#!/usr/bin/env bash
# CIFAR-10 with few labels, 32 x 32 pixels, WRN-10-2, on two CPU cores: the 2 x 2 with 1,000 labels,
# ten seeds, and with 5,000, five; AT+DRA with an untrained teacher with 1,000, five; AT and
# AT+DRA with all labels, three. A run takes about half an hour of one core, half of it the attack;
# all of them, and AutoAttack on four, about eighteen hours on two cores.
#
# One teacher for all: docs/cifar10-teacher, trained without labels on the 48,976 images that are
# not held out. What was chosen, was chosen on the held-out images (docs/log.md). The cells of a
# seed share the initial weights; those that differ in DRA alone also share batches, crops and
# attack starts.
#
# CIFAR-10 lies in data/, as class folders or as the archive: DATA=DIR bash runs/cifar10_small.sh
# names another place. Our runs are of the images as JPEG, in class folders. The archive has the
# images in another order: of the held-out ones there the teacher has seen most, without labels.
# Every command resumes. Rows of two machines cannot stand beside each other: on another machine
# `make evidence` replaces all of ours.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/evidence
cifar="--dataset cifar10 --data-dir ${DATA:-data} --precision bf16"
teacher=docs/cifar10-teacher
untrained=$out/diffusion-cifar-untrained
network="--patch 2 --channels 64 128 128 --batch-size 64 --warmup-steps 500 --ema-decay 0.999"
recipe="--model wrn-10-2 --n-steps 3 --step-size 4/255 --batch-size 64 --lr 0.2 --clip-norm 5
  --warmup-fraction 0.2 --epoch-images 3200 --epochs 20 --eval-every 4 --eval-n-steps 10"
dra="--block up_blocks.1.resnets.1 --sigma 0.1 --head-width 256 --teacher"

# The images for N labels: the teacher's, without a label. A standard classifier that has the N
# labels labels them and keeps the half that it is surest of: images N
images() {
  python train_at.py $cifar --loss standard --model wrn-16-4 --n-train $1 --batch-size 64 --lr 0.1 \
    --clip-norm 5 --epoch-images 3200 --epochs 20 --eval-every 10 --eval-n-steps 1 \
    --out-dir out/standard-cifar-$1
  python generate_synthetic.py $cifar --diffusion $teacher --relabel --keep-fraction 0.5 \
    --classifier out/standard-cifar-$1/best.pt --n-images 20000 --shard-size 2000 --n-steps 10 \
    --out-dir $out/synthetic-cifar-$1
}
# One cell, attacked by APGD-CE+T: cell NAME CELL SEED SCRIPT FLAG...
cell() {
  local run=$out/cifar-$1/$2/$3
  python $4 $cifar $recipe --seed $3 --out-dir $run "${@:5}"
  python evaluate.py $cifar --attack apgd --n-images 2000 --checkpoint $run/best.pt
}
# The 2 x 2 of a seed: two_by_two LABELS SEED
two_by_two() {
  local labels="--n-train $1" dm="--synthetic $out/synthetic-cifar-$1"
  cell $1 at $2 train_at.py $labels
  cell $1 at_dra $2 train_at_aux.py $dra $teacher $labels
  cell $1 dm_at $2 train_at.py $dm $labels
  cell $1 dm_at_dra $2 train_at_aux.py $dm $dra $teacher $labels
}
# A control: the teacher's network after one step, which has learned nothing: untrained SEED
untrained() {
  cell 1000 at_dra,untrained $1 train_at_aux.py $dra $untrained --n-train 1000
}
all_labels() {
  cell all at $1 train_at.py
  cell all at_dra $1 train_at_aux.py $dra $teacher
}

python train_diffusion.py $cifar $network --n-labels 0 --train-steps 1 --out-dir $untrained
images 1000 & lane=$!
images 5000
wait $lane
lane() {
  for seed in 0 2 4; do two_by_two 1000 $seed; untrained $seed; done
  for seed in 5 7 9; do two_by_two 1000 $seed; done
  for seed in 1 3; do two_by_two 5000 $seed; done
  all_labels 1
}
lane & lane=$!
for seed in 1 3; do two_by_two 1000 $seed; untrained $seed; done
for seed in 6 8; do two_by_two 1000 $seed; done
for seed in 0 2 4; do two_by_two 5000 $seed; done
for seed in 0 2; do all_labels $seed; done
wait $lane
# AutoAttack on the cells of one seed.
for name in at at_dra dm_at dm_at_dra; do
  torchrun --nproc_per_node 2 evaluate.py $cifar --attack autoattack --n-images 2000 \
    --checkpoint $out/cifar-1000/$name/0/best.pt
done
python -m runs.results --add $out
