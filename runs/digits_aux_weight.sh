#!/usr/bin/env bash
# How --aux-weight was chosen for digits: robust accuracy on the 200 held-out training images, three
# seeds, AT+DRA. Each run prints its line; `grep best.pt` collects them. Needs out/diffusion-digits;
# about 25 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
out=out/aux-weight

# row NAME SCRIPT FLAG...
row() { python $2 --seed $seed --out-dir $out/$1-seed$seed "${@:3}"; }

for seed in 0 1 2; do
  row at train_at.py
  for weight in 0.3 1 3; do row centred-$weight train_at_aux.py --aux-weight $weight; done
  for weight in 0.1 0.3 1 3; do
    row raw-$weight train_at_aux.py --aux-weight $weight --no-center-targets
  done
done
