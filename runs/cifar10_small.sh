#!/usr/bin/env bash
# CIFAR-10 with few labels, 32 x 32 pixels, WRN-10-2, on two CPU cores: the 2 x 2 and two controls
# with 1,000 and with 5,000 labels, five seeds, and the 2 x 2 with all labels, three seeds. One
# teacher for all: docs/cifar10-teacher, trained without labels on the 48,976 images that are not
# held out. All choices were made on the held-out images (docs/log.md). The cells of a seed share
# the initial weights; those that differ in DRA alone also share batches, crops and attack starts.
#
# CIFAR-10 lies in data/ as the archive or as class folders: DATA=DIR bash runs/cifar10_small.sh
# names another place. Our runs are of the images as JPEG. Every command resumes.
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
# labels labels them and keeps the half that it is surest of: images NAME FLAG...
images() {
  python train_at.py $cifar --loss standard --model wrn-16-4 --batch-size 64 --lr 0.1 --clip-norm 5 \
    --epoch-images 3200 --epochs 20 --eval-every 10 --eval-n-steps 1 "${@:2}" \
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
# The 2 x 2 of a seed: two_by_two NAME SEED FLAG...
two_by_two() {
  local dm="--synthetic $out/synthetic-cifar-$1"
  cell $1 at $2 train_at.py "${@:3}"
  cell $1 at_dra $2 train_at_aux.py $dra $teacher "${@:3}"
  cell $1 dm_at $2 train_at.py $dm "${@:3}"
  cell $1 dm_at_dra $2 train_at_aux.py $dm $dra $teacher "${@:3}"
}
controls() {
  local dm="--synthetic $out/synthetic-cifar-$1"
  cell $1 shuffled $2 train_at_aux.py $dm $dra $teacher --shuffle-targets "${@:3}"
  cell $1 untrained $2 train_at_aux.py $dm $dra $untrained "${@:3}"
}
# Everything of a seed with N labels: few_labels N SEED
few_labels() {
  two_by_two $1 $2 --n-train $1
  controls $1 $2 --n-train $1
}
all_labels() { two_by_two all $1; }

# Where no label was seen, nothing was learned of them, and after one step nothing at all.
python train_diffusion.py $cifar $network --n-labels 0 --train-steps 1 --out-dir $untrained
images 1000 --n-train 1000 & lane=$!
images 5000 --n-train 5000
wait $lane
images all
for labels in 1000 5000; do
  for seed in 0 2 4; do few_labels $labels $seed; done & lane=$!
  for seed in 1 3; do few_labels $labels $seed; done
  wait $lane
done
for seed in 0 2; do all_labels $seed; done & lane=$!
all_labels 1
wait $lane
# AutoAttack on the cells of one seed.
for labels in 1000 5000; do
  for name in at at_dra dm_at dm_at_dra; do
    torchrun --nproc_per_node 2 evaluate.py $cifar --attack autoattack --n-images 1000 \
      --checkpoint $out/cifar-$labels/$name/0/best.pt
  done
done
python -m runs.results --add $out
