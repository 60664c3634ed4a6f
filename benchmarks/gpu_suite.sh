#!/usr/bin/env bash
# A GPU measured in one command, in eight minutes and without a network: correctness first (loss and gradient against
# float64, DALI's pixels, CUDA graphs, precision), then ViT-L/16 and ViT-B/16 eager, compiled and in CUDA graphs in turns
# with a plain PyTorch loop and with the IFA head, the loader in turns with DALI's usual pipeline, both end to end, memory
# and energy, and a run through the command line that is stopped, resumed and evaluated.
#
#   benchmarks/gpu_suite.sh [--smoke] [--name NAME] [--budget SECONDS] [--results DIR] [--shards SET]
#
#   --smoke    the same with small models and a few steps, on the CPU where there is no GPU
#   --name     of the result, benchmarks/results/gpu/NAME.json (default: the device's name)
#   --budget   seconds for all of it, the drawing of the images included (default: 480)
#   --results  a folder in place of benchmarks/results (--smoke: data/gpu-suite-smoke/results)
#   --shards   a shard set of images baked to the training square, 160 px (default: one is drawn into data/)
#
# PYTHON names the interpreter (default: .venv/bin/python where there is one, else python3).
#
# The result is written after every point; the same command continues where one was cut off. Exit status 1 if a
# correctness point failed.
set -euo pipefail

smoke='' name='' budget=480 results='' shards=''
while (($#)); do
  case $1 in
    --smoke)
      smoke=1
      shift
      ;;
    --name | --budget | --results | --shards)
      [[ $# -ge 2 ]] || { echo "error: gpu_suite.sh: $1 needs a value" >&2 && exit 2; }
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --help | -h)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *)
      echo "error: gpu_suite.sh: unknown argument '$1'; --help lists what there is" >&2
      exit 2
      ;;
  esac
done
[[ $budget =~ ^[0-9]+$ ]] || { echo "error: gpu_suite.sh: --budget is '$budget', not a whole number of seconds" >&2 && exit 2; }
budget=$((10#$budget)) # or 0480 would be octal

# What is relative is so to where the user is.
[[ -z $results ]] || results=$(realpath -m -- "$results")
[[ -z $shards ]] || shards=$(realpath -m -- "$shards")
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(realpath -ms -- "$python") # not where a link leads: a venv's would leave the venv
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python

if [[ -n $smoke ]]; then
  shards=${shards:-data/gpu-suite-smoke/shards}
  drawing=(--characters 4 --pictures 160 --size 40)
else
  shards=${shards:-data/gpu-suite}
  drawing=(--pictures 4000 --size 160)
fi
if [[ ! -f $shards/manifest.json ]]; then
  # Most points need no images: continue without them.
  "$python" -m shards demo "$shards" "${drawing[@]}" >&2 ||
    echo "gpu_suite.sh: the images could not be drawn; the points that need them will fail" >&2
fi

exec "$python" -m benchmarks gpu --shards "$shards" --budget "$((budget > SECONDS ? budget - SECONDS : 0))" \
  ${smoke:+--smoke} ${name:+--name "$name"} ${results:+--results "$results"}
