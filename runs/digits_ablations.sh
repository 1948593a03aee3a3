#!/usr/bin/env bash
# One setting at a time, after runs/digits_table.sh, whose recipe, diffusion model, images and cells it shares: three seeds with one flag
# changed, APGD-CE+T on all 797 test images. About two hours on two CPU cores; every command resumes.
set -meuo pipefail  # -m: a job in the background is a process group, all of which ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
out=out/evidence/digits-100
teacher=out/evidence/diffusion-100
images=out/evidence/synthetic-100
few=(--val-size 500 --n-train 100)
recipe=(--val-size 500 --n-train 100 --epoch-images 896 --seed)

# AT+DRA; alone CELL FLAG...: of a flag given twice, the last counts.
alone() {
  for seed in 0 1 2; do
    python train_at_aux.py "${recipe[@]}" $seed --teacher $teacher "${@:2}" --out-dir $out/$1/$seed
    python evaluate.py --attack apgd --checkpoint $out/$1/$seed/best.pt
  done
}
# DM-AT+DRA; aligned CELL FLAG...
aligned() { alone "$1" --synthetic $images "${@:2}"; }
# AT with CutMix (Rebuffi et al., arXiv 2103.01946, find that it too ends robust overfitting): not images, only regularisation.
cutmix() {
  for seed in 0 1 2; do
    python train_at.py "${recipe[@]}" $seed --cutmix 1 --out-dir $out/at,cutmix=1/$seed
    python evaluate.py --attack apgd --checkpoint $out/at,cutmix=1/$seed/best.pt
  done
}
# DM-AT; mixed CELL FLAG...
mixed() {
  for seed in 0 1 2; do
    python train_at.py "${recipe[@]}" $seed --synthetic $images "${@:2}" --out-dir $out/$1/$seed
    python evaluate.py --attack apgd --checkpoint $out/$1/$seed/best.pt
  done
}
# DM-AT on another synthetic set; generated CELL FLAG..., flags of generate_synthetic.py.
generated() {
  python generate_synthetic.py "${few[@]}" --diffusion $teacher "${@:2}" --out-dir out/evidence/synthetic-100-${1/=/-}
  mixed $1 --synthetic out/evidence/synthetic-100-${1/=/-}
}

for steps in 50 400; do python train_diffusion.py "${few[@]}" --train-steps $steps --out-dir out/evidence/diffusion-100-steps-$steps; done
for seed in 1 2; do python train_diffusion.py "${few[@]}" --train-steps 200 --seed $seed --out-dir out/evidence/diffusion-100-seed-$seed; done
python train_diffusion.py --val-size 500 --n-train 500 --train-steps 800 --out-dir out/evidence/diffusion-500  # digits_curve.sh's

representations() {
  aligned aux_weight=0.1 --aux-weight 0.1
  aligned aux_weight=0.3 --aux-weight 0.3
  aligned aux_weight=3 --aux-weight 3
  aligned sigma=0.03 --sigma 0.03
  aligned sigma=0.3 --sigma 0.3
  aligned sigma=1 --sigma 1
  aligned block=down_blocks.1.resnets.0 --block down_blocks.1.resnets.0
  aligned block=mid_block --block mid_block
  aligned block=up_blocks.1.resnets.0 --block up_blocks.1.resnets.0
  aligned align_loss=contrastive --align-loss contrastive
  aligned align=clean --align clean
  aligned align=both --align both
  aligned teacher_images=500 --teacher out/evidence/diffusion-500
  alone at_dra,teacher_images=500 --teacher out/evidence/diffusion-500
  alone at_dra,shuffled --shuffle-targets
  aligned teacher_label=true --teacher-label true
  for steps in 50 400; do aligned teacher_steps=$steps --teacher out/evidence/diffusion-100-steps-$steps; done
}
pictures() {
  for n in 300 1000 3000 30000 100000; do generated n_images=$n --n-images $n; done
  for share in 0.3 0.5 0.9; do mixed synthetic_fraction=$share --synthetic-fraction $share; done
  mixed loss=pgd --loss pgd
  cutmix
  for steps in 50 400; do generated diffusion_steps=$steps --diffusion out/evidence/diffusion-100-steps-$steps; done
  for seed in 1 2; do generated diffusion_seed=$seed --diffusion out/evidence/diffusion-100-seed-$seed --seed $seed; done
  for scale in 0.5 2; do generated guidance_scale=$scale --guidance-scale $scale; done
}
representations & lane=$!
pictures
wait $lane
python -m runs.results --add out/evidence
