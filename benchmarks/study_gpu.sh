#!/bin/sh
# The study on a GPU machine that is reached by commands of limited time and reaches no package registry itself.
#
# Builds qvit, unpacks the images, trains on from where the last call stopped, and collects what was measured. What a
# fresh machine needs to go on (the teacher, finished runs) is left in RESULTS in parts below 15 MB. The status is 0 once
# all is finished, 143 while there is more to do.
#
# Usage: sh benchmarks/study_gpu.sh ARCHIVE STATE MINUTES RESULTS [PLAN]
#   ARCHIVE  cifar10-train.tar.xz
#   STATE    folder that is kept between calls
#   MINUTES  after which the run saves itself and stops
#   RESULTS  folder for results.jsonl and state.tar.NN; if it holds such parts and STATE is new, they are unpacked first
#   PLAN     benchmarks/study_gpu.yaml if not given
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
archive=$1 state=$2 minutes=$3 results=$4 plan=${5:-$here/benchmarks/study_gpu.yaml}
python=${PYTHON:-python3}
mkdir -p "$results"

if [ ! -d "$state/site" ]; then
    mkdir -p "$state/runs"
    if [ -e "$results/state.tar.00" ]; then
        cat "$results"/state.tar.* | tar -x -C "$state/runs"
    fi
    if "$python" -m uv --version >/dev/null 2>&1; then
        set -- uv pip install --python "$python"
    else
        set -- pip install
    fi
    "$python" -m "$@" --quiet --no-index --no-deps --no-build-isolation --target "$state/new" "$here"
    mv "$state/new" "$state/site"
fi
export PYTHONPATH="$state/site" PYTHONUNBUFFERED=1
if [ ! -d "$state/cifar10" ]; then
    "$python" "$here/benchmarks/cifar10_folders.py" "$archive" "$state/unpacking"
    mv "$state/unpacking" "$state/cifar10"
fi

status=0
"$python" "$here/benchmarks/study.py" run "$plan" --data "$state/cifar10" --out "$state/runs" --minutes "$minutes" ||
    status=$?
if [ -e "$state/runs/teacher/model.pt" ]; then
    "$python" "$here/benchmarks/study.py" collect "$plan" --data "$state/cifar10" --out "$state/runs" \
        --results "$results/results.jsonl"
    rm -f "$results"/state.tar.*
    (cd "$state/runs" && find . -name model.pt -o -name experiment.json -o -name result.json -o -path ./teacher/metrics.jsonl |
        tar -c -T -) | split -d -a 2 -b 15000000 - "$results/state.tar."
fi
exit "$status"
