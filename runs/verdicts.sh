#!/usr/bin/env bash
# Does the verdict on a teacher predict what DRA gives? The verdict of extract_features.py on the
# teacher of every 2 x 2 of docs/results.md, with a pupil of AT, seed 0, and then the table of
# verdicts and measured effects. The effects are those of docs/results.json, or of out/evidence.
#
# CIFAR-10's pupils are those of runs/cifar10_small.sh, which comes first. Every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/evidence
cifar="--dataset cifar10 --data-dir ${DATA:-data} --precision bf16"
fashion="--dataset fashion-mnist --data-dir ${FASHION:-/usr/share/datasets/fashion-mnist}"

# A verdict: verdict EXPERIMENT TEACHER PUPIL FLAG...
verdict() {
  python extract_features.py --diffusion $2 --verdict --pupil $3/best.pt --out-dir $out/verdict-$1 \
    "${@:4}"
}
# On digits, of a teacher that learned from the pupil's images alone: digits NAME STEPS FLAG...
digits() {
  local flags="${@:3}" pupil=out/pupils/digits-$1
  python train_diffusion.py $flags --train-steps $2 --out-dir $out/diffusion-$1
  python train_at.py $flags --epoch-images 896 --out-dir $pupil
  verdict digits-$1 $out/diffusion-$1 $pupil $flags --eps 0.15
}
fashion() {
  local pupil=out/pupils/fashion-6400
  python train_diffusion.py $fashion --val-size 1024 --channels 24 48 48 --batch-size 64 \
    --train-steps 1500 --eval-every 300
  python train_at.py $fashion --n-train 6400 --out-dir $pupil
  verdict fashion-6400 out/diffusion-fashion-mnist $pupil $fashion --n-train 6400 --eps 0.1
}

# Is there what this script does not make?
python train_at.py $fashion --n-train 6400 --check
for labels in 1000 5000 all; do
  python evaluate.py $cifar --check --checkpoint $out/cifar-$labels/at/0/best.pt
done
fashion & lane=$!
digits 100 200 --val-size 500 --n-train 100
digits 200 400 --val-size 500 --n-train 200
digits 500 800 --val-size 500 --n-train 500
digits 800 1200 --val-size 200 --n-train 800
digits long-tail 200 --val-size 500 --imbalance 10
attack="--eps 8/255 --n-attacked 64"
for labels in 1000 5000; do
  pupil=$out/cifar-$labels/at/0
  verdict cifar-$labels docs/cifar10-teacher $pupil $cifar $attack --n-train $labels
done
verdict cifar-1000,untrained $out/diffusion-cifar-untrained $out/cifar-1000/at/0 $cifar $attack \
  --n-train 1000
# With all labels at the block of DRA alone: features at all blocks would take 13 GB.
verdict cifar-all docs/cifar10-teacher $out/cifar-all/at/0 $cifar $attack \
  --blocks up_blocks.1.resnets.1
wait $lane
python -m runs.results --add $out
