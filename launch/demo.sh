#!/usr/bin/env bash
# From nothing to predictions: draw data, train under the deepspeed launcher, evaluate, show. Run it with `make demo`.
# Arguments are passed to the recipe.
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${RANKS:-2} pictures=${PICTURES:-8000}
run=runs/demo

# Threads per rank: two ranks with all cores each would be twice as slow. DeepSpeed finds a GPU by itself.
cores=$(nproc)
export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))

python -m shards demo data/demo --pictures "$pictures"
rm -rf "$run"
deepspeed --num_accelerators "$ranks" launch/train.py --config launch/recipes/demo.yaml "$@" --train.run "$run"
dist-train evaluate "$run" --split test
dist-train grid "$run"
python -m benchmarks histogram data/demo

echo
echo "Summary:              $run/summary.json"
echo "Grid of predictions:  $run/predictions.png"
echo "Curves:               tensorboard --logdir $run/tensorboard   (http://localhost:6006)"
