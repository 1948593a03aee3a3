#!/usr/bin/env bash
# The forms of DRA of runs/dra_variants.py and two smaller weights, without synthetic images, beside AT and AT+DRA of runs/digits_table.sh,
# after which it comes: three seeds, held-out accuracy alone (docs/log.md). About fifteen minutes on two CPU cores. What was trained to its
# end is not trained again.
set -meuo pipefail  # -m: a job in the background is a process group, all of which ends with this script
cd "$(dirname "$0")/.."
trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1  # two commands at once, one core each
out=out/evidence/digits-100
recipe=(--val-size 500 --n-train 100 --epoch-images 896 --teacher out/evidence/diffusion-100 --seed)

# A variant, $name, does not resume: each is trained beside its place and moved there when it is done.
variants() {
  for seed in 0 1 2; do
    [ ! -e $out/at_dra,variant=$name/$seed ] || continue
    rm -rf out/variant-$name-$seed
    python -m runs.dra_variants $name "${recipe[@]}" $seed --out-dir out/variant-$name-$seed
    mkdir -p $out/at_dra,variant=$name
    mv out/variant-$name-$seed $out/at_dra,variant=$name/$seed
  done
}
for name in whiten levels stage2; do variants; done & lane=$!
for name in spatial rise fall; do variants; done
wait $lane
for seed in 0 1 2; do python train_at_aux.py "${recipe[@]}" $seed --aux-weight 0.1 --out-dir $out/at_dra,aux_weight=0.1/$seed; done & lane=$!
for seed in 0 1 2; do python train_at_aux.py "${recipe[@]}" $seed --aux-weight 0.3 --out-dir $out/at_dra,aux_weight=0.3/$seed; done
wait $lane
python -m runs.results --add out/evidence
