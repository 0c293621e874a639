#!/usr/bin/env bash
# What the first GPU is asked, the most worthwhile first, within nine minutes:
#
#     MRCNN_DATA=/path/to/data benchmarks/gpu.sh OUT [PART ...]
#
# Appends a JSON line for each part to OUT/gpu.jsonl as it ends: its exit status (124: out of time),
# seconds, and the last JSON line that it printed; what it printed is in OUT/PART.log. Parts:
# environment, tests (tests/gpu), steps and predictions beside torchvision in bfloat16 at batch 2, 1
# and 16, staged ($CONFIG, by default configs/coco300.py, three epochs a stage, with a trace of five
# steps of each, then its AP). $PYTHON has jax[cuda13], torch and requirements.
#
# To try it without a GPU: PLATFORM=cpu CANVAS="64 64" SMALL=1 LARGE=1 ROUNDS=1.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT [PART ...]}")
shift
python=$(command -v "${PYTHON:-python}") && python=$(realpath -s "$python") || exit 2
cd "$(dirname "$0")/.." || exit 2
platform=${PLATFORM:-gpu}
canvas=${CANVAS:-800 1344}
small=${SMALL:-2}
large=${LARGE:-16}
rounds=${ROUNDS:-5}
total=${TOTAL:-540}
config=${CONFIG:-configs/coco300.py}
mkdir -p "$out"
began=$SECONDS

environment() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
  "$python" - <<'PYTHON'
import importlib.metadata as metadata
import json, os, platform
import jax

names = ("jax", "jaxlib", "flax", "optax", "torch", "torchvision")
versions = {}
for name in names:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        versions[name] = None
devices = [device.device_kind for device in jax.devices()]
print(json.dumps({"python": platform.python_version(), "devices": devices, "cores": os.cpu_count()} | versions))
PYTHON
}

tests() {
  if [ "$platform" = gpu ]; then export JAX_PLATFORMS=cuda,cpu; fi
  MRCNN_GPU_TESTS=$platform "$python" -m pytest -n 0 -rA tests/gpu
}

step() {
  # shellcheck disable=SC2086 # the canvas is two numbers
  "$python" benchmarks/train_step.py --batch "$1" --canvas $canvas --dtype bfloat16 --rounds "$rounds"
}

prediction() {
  # shellcheck disable=SC2086
  "$python" benchmarks/inference.py --batch "$1" --canvas $canvas --dtype bfloat16 --rounds "$rounds"
}

staged() {
  "$python" train.py --config "$config" --workdir "$out/staged" --profile \
    --model.compute-dtype bfloat16 --stages.0.epochs 3 --stages.1.epochs 3 --stages.2.epochs 3 &&
    "$python" eval.py --workdir "$out/staged" && tr -d '\n' <"$out/staged/eval/metrics.json"
}

# NAME SECONDS COMMAND...: a part, in no more than these seconds and those that are left of all.
part() {
  local name=$1 limit=$2 left=$((total - SECONDS + began)) start=$SECONDS status
  shift 2
  if [ "${#wanted[@]}" -gt 0 ] && [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
  if [ "$left" -lt 10 ]; then return; fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  timeout "$limit" bash -c "$functions; $*" >"$out/$name.log" 2>&1
  status=$?
  printf '{"part": "%s", "status": %d, "seconds": %d, "result": %s}\n' "$name" "$status" \
    $((SECONDS - start)) "$(grep '^{.*}$' "$out/$name.log" | tail -1 | grep . || echo null)" \
    | tee -a "$out/gpu.jsonl"
}

wanted=("$@")
functions="set -uo pipefail; $(declare -f environment tests step prediction staged)"
functions+="; $(declare -p python platform canvas rounds out config)"
part environment 30 environment
part tests 100 tests
part "step$small" 140 step "$small"
part prediction1 70 prediction 1
part "step$large" 120 step "$large"
part staged 150 staged
part "prediction$large" 80 prediction "$large"
exit 0
