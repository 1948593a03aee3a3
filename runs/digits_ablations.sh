#!/usr/bin/env bash
# One setting at a time, after runs/digits_table.sh, whose recipe, diffusion model, images and cells
# it shares: three seeds with one flag changed, APGD-CE+T on all 797 test images.
# About two hours on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group and ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
evidence=out/evidence
digits="--val-size 500 --n-train 100"
dm="--synthetic $evidence/synthetic-100"
dra="--teacher $evidence/diffusion-100"

# One setting: setting NAME SCRIPT FLAG... Of a flag given twice, the last counts.
setting() {
  local seed run
  for seed in 0 1 2; do
    run=$evidence/digits-100/$1/$seed
    python $2 $digits --epoch-images 896 --seed $seed --out-dir $run "${@:3}"
    python evaluate.py --attack apgd --checkpoint $run/best.pt
  done
}
at() { setting "$1" train_at.py "${@:2}"; }
at_dra() { setting "$1" train_at_aux.py $dra "${@:2}"; }
dm_at() { setting "$1" train_at.py $dm "${@:2}"; }
dm_at_dra() { setting "$1" train_at_aux.py $dm $dra "${@:2}"; }
# DM-AT on another synthetic set: other_set NAME FLAG..., flags of generate_synthetic.py.
other_set() {
  local images=$evidence/synthetic-100-${1/=/-}
  python generate_synthetic.py $digits --diffusion $evidence/diffusion-100 "${@:2}" \
    --out-dir $images
  dm_at $1 --synthetic $images
}
# Another diffusion model: diffusion NAME N_TRAIN STEPS SEED
diffusion() {
  python train_diffusion.py --val-size 500 --n-train $2 --train-steps $3 --seed $4 \
    --out-dir $evidence/diffusion-$1
}

diffusion 100-steps-50 100 50 0
diffusion 100-steps-400 100 400 0
diffusion 100-seed-1 100 200 1
diffusion 100-seed-2 100 200 2
diffusion 500 500 800 0  # that of runs/digits_curve.sh

representations() {
  for weight in 0.1 0.3 3; do dm_at_dra aux_weight=$weight --aux-weight $weight; done
  for sigma in 0.03 0.3 1; do dm_at_dra sigma=$sigma --sigma $sigma; done
  for block in down_blocks.1.resnets.0 mid_block up_blocks.1.resnets.0; do
    dm_at_dra block=$block --block $block
  done
  dm_at_dra align_loss=contrastive --align-loss contrastive
  for align in clean both; do dm_at_dra align=$align --align $align; done
  dm_at_dra teacher_images=500 --teacher $evidence/diffusion-500
  at_dra at_dra,teacher_images=500 --teacher $evidence/diffusion-500
  at_dra at_dra,shuffled --shuffle-targets
  dm_at_dra teacher_label=true --teacher-label true
  for steps in 50 400; do
    dm_at_dra teacher_steps=$steps --teacher $evidence/diffusion-100-steps-$steps
  done
}
pictures() {
  for n in 300 1000 3000 30000 100000; do other_set n_images=$n --n-images $n; done
  for share in 0.3 0.5 0.9; do dm_at synthetic_fraction=$share --synthetic-fraction $share; done
  dm_at loss=pgd --loss pgd
  # CutMix also ends robust overfitting (Rebuffi et al., arXiv 2103.01946), and adds no images.
  at at,cutmix=1 --cutmix 1
  for steps in 50 400; do
    other_set diffusion_steps=$steps --diffusion $evidence/diffusion-100-steps-$steps
  done
  for seed in 1 2; do
    other_set diffusion_seed=$seed --diffusion $evidence/diffusion-100-seed-$seed --seed $seed
  done
  for scale in 0.5 2; do other_set guidance_scale=$scale --guidance-scale $scale; done
}
representations & lane=$!
pictures
wait $lane
python -m runs.results --add $evidence
