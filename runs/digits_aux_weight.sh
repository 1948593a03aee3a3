#!/usr/bin/env bash
# How --aux-weight was chosen for digits: robust accuracy on the 200 held-out training images, three seeds, AT+DRA.
# Each run prints its line; `grep best.pt` collects them. Needs out/diffusion-digits; about 25 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
out=out/aux-weight
for seed in 0 1 2; do
  python train_at.py --seed $seed --out-dir $out/at-seed$seed
  for weight in 0.3 1 3; do
    python train_at_aux.py --seed $seed --aux-weight $weight --out-dir $out/centred-$weight-seed$seed
  done
  for weight in 0.1 0.3 1 3; do
    python train_at_aux.py --seed $seed --aux-weight $weight --no-center-targets --out-dir $out/raw-$weight-seed$seed
  done
done
