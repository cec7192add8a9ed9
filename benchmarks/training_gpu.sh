#!/bin/sh
# The training step on a GPU machine that reaches no package registry: its time and memory, the kernels that it spends its
# time on, and whether loading keeps up with it.
#
# Usage: sh benchmarks/training_gpu.sh RESULTS MODEL DATA RECIPE
#   RESULTS  folder for training.json, training.txt (tables and the profiler's top ten), loading.json and loading.txt
#   MODEL    timm's name, deit_small_patch16_224 for one
#   DATA     a folder of class folders with pictures of the size that users have
#   RECIPE   deit_imagenet for one: its augmentation and its batches are those that are loaded
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
results=$1 model=$2 data=$3 recipe=$4
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "$results"

"$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" "$here"
export PYTHONPATH="$site" PYTHONUNBUFFERED=1 COLUMNS=120
"$python" "$here/benchmarks/training.py" --model "$model" --profile --json "$results/training.json" \
    >"$results/training.txt"
"$python" "$here/benchmarks/loading.py" "$model" --data "$data" --recipe "$recipe" --seconds 3 --compile \
    --json "$results/loading.json" >"$results/loading.txt"
cat "$results/training.txt" "$results/loading.txt"
