#!/usr/bin/env bash
# DRA as a contrast (--align-loss contrastive) without synthetic images, and its two controls: the
# same with shuffled targets and with an untrained teacher. After runs/digits_table.sh, beside whose
# AT it stands; APGD-CE+T on all 797 test images. The form was chosen by the held-out accuracy of
# seeds 0 to 2 (docs/log.md), so it is judged by seeds 3 to 9.
# About half an hour on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/evidence/digits-100
digits="--val-size 500 --n-train 100"
teacher=out/evidence/diffusion-100
untrained=out/evidence/diffusion-100-steps-1
form="at_dra,align_loss=contrastive"

python train_diffusion.py $digits --train-steps 1 --out-dir $untrained

# One cell: cell NAME SEED FLAG...
cell() {
  python train_at_aux.py $digits --epoch-images 896 --align-loss contrastive --seed $2 \
    --out-dir $out/$1/$2 "${@:3}"
  python evaluate.py --attack apgd --checkpoint $out/$1/$2/best.pt
}
cells() {
  cell $form $1 --teacher $teacher
  cell $form,shuffled $1 --teacher $teacher --shuffle-targets
  cell $form,teacher_steps=1 $1 --teacher $untrained
}
for seed in 3 5 7 9; do cells $seed; done & lane=$!
for seed in 4 6 8; do cells $seed; done
wait $lane
python -m runs.results --add out/evidence
