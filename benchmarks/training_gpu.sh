#!/bin/sh
# The training step on a GPU machine that reaches no package registry: its time and memory, the kernels that it spends its
# time on, and whether loading keeps up with it. Nothing is built: no step needs the engine.
#
# Usage: sh benchmarks/training_gpu.sh RESULTS MODEL DATA RECIPE [OPTION...]
#   RESULTS  folder for training.json, training.txt (tables and the profiler's top ten), loading.json and loading.txt
#   MODEL    timm's name, deit_small_patch16_224 for one
#   DATA     a folder of class folders with pictures of the size that users have
#   RECIPE   deit_imagenet for one: its augmentation and its batches are those that are loaded
#   OPTION   of benchmarks/training.py
#
# To try it without a GPU: sh benchmarks/training_gpu.sh results vit_tiny_patch16_224 digits digits --depth 1 --rounds 1
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
results=$1 model=$2 data=$3 recipe=$4
shift 4
python=${PYTHON:-python3}
mkdir -p "$results"

export PYTHONPATH="$here/src" PYTHONUNBUFFERED=1 COLUMNS=120
"$python" "$here/benchmarks/training.py" --model "$model" --profile --json "$results/training.json" "$@" \
    >"$results/training.txt"
"$python" "$here/benchmarks/loading.py" "$model" --data "$data" --recipe "$recipe" --seconds 3 --compile \
    --json "$results/loading.json" >"$results/loading.txt"
cat "$results/training.txt" "$results/loading.txt"
