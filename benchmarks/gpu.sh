#!/usr/bin/env bash
# What the first GPU is asked, the most worthwhile first, within nine minutes:
#
#     MRCNN_DATA=/path/to/data benchmarks/gpu.sh OUT [PART ...]
#
# Appends a JSON line for each part to OUT/gpu.jsonl as it ends: its exit status (124, or 137 if it
# had to be killed: out of time), seconds, and the last JSON line that it printed. What it printed,
# and the training's figures, are then in OUT/files.tar.gz. Parts, of which the last ones may get no
# time:
#
#     environment    versions, a product on the GPU, and whether requirements.txt is installed; if
#                    that fails, nothing else is tried
#     step2 step16   a training step beside torchvision's in bfloat16, at these batches
#     prediction1 prediction16
#     tests          tests/gpu
#     own            what README.md types: train.py on coco300 for two minutes, then its AP
#
# $PYTHON has jax[cuda13], torch, requirements.txt and, for tests, requirements-dev.txt. To try it
# without a GPU: PLATFORM=cpu CANVAS="64 64" SMALL=1 LARGE=1 ROUNDS=1.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT [PART ...]}")
shift
python=${PYTHON:-$(command -v python || echo python3)}
python=$(command -v "$python") && python=$(realpath -s "$python") || exit 2
data=$(realpath -m "${MRCNN_DATA:-/nowhere}")
cd "$(dirname "$0")/.." || exit 2
platform=${PLATFORM:-gpu}
canvas=${CANVAS:-800 1344}
small=${SMALL:-2}
large=${LARGE:-16}
rounds=${ROUNDS:-5}
total=${TOTAL:-540}
minutes=${MINUTES:-2}
parts=(environment "step$small" prediction1 tests own "step$large" "prediction$large")
wanted=("$@")
if [ "${#wanted[@]}" -eq 0 ]; then wanted=("${parts[@]}"); fi
for name in "${wanted[@]}"; do
  if [[ " ${parts[*]} " != *" $name "* ]]; then
    echo "$name: no such part (${parts[*]})" >&2
    exit 2
  fi
done
if [[ " ${wanted[*]} " == *" own "* && ! -d $data/coco300 ]]; then
  echo "MRCNN_DATA: no coco300 in ${MRCNN_DATA:-it}" >&2
  exit 2
fi
work=$(mktemp -d)
runs=$(mktemp -d)
trap 'rm -rf "$work" "$runs"' EXIT
mkdir -p "$out"
began=$SECONDS

environment() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
  "$python" - "$platform" <<'PYTHON'
import importlib.metadata as metadata
import json, os, platform, re, sys
from pathlib import Path
import jax
import jax.numpy as jnp

names = re.findall(r"^[\w-]+", Path("requirements.txt").read_text(), re.MULTILINE)
versions = {}
for name in (*names, "torch", "torchvision", "pytest-xdist"):
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        versions[name] = None
devices = [device.device_kind for device in jax.devices()]
ones = jnp.ones((256, 256))
assert float((ones @ ones)[0, 0]) == 256
print(json.dumps({"python": platform.python_version(), "devices": devices, "cores": os.cpu_count()} | versions))
import mrcnn_jax.data.builder, mrcnn_jax.training.loop
missing = [name for name, version in versions.items() if version is None]
if jax.default_backend() != sys.argv[1]:
    missing.append(f"a {sys.argv[1]} (JAX has the {jax.default_backend()})")
sys.exit(f"missing: {', '.join(missing)}" if missing else None)
PYTHON
}

tests() {
  # XLA's backend for GPUs knows nothing of the little effort that tests ask of the one for CPUs.
  if [ "$platform" = gpu ]; then export JAX_PLATFORMS=cuda,cpu XLA_FLAGS=; fi
  MRCNN_GPU_TESTS=$platform "$python" -m pytest -n 0 -vv -rA tests/gpu
}

step() {
  # shellcheck disable=SC2086 # the canvas is two numbers
  "$python" benchmarks/train_step.py --batch "$1" --canvas $canvas --dtype bfloat16 --rounds "$rounds"
}

prediction() {
  # shellcheck disable=SC2086
  "$python" benchmarks/inference.py --batch "$1" --canvas $canvas --dtype bfloat16 --rounds "$rounds" \
    --only ours torchvision torchvision_channels_last
}

own() {
  "$python" train.py "$data/coco300" --weights "$data/weights/pqf_resnet50_large.npz" \
    --workdir "$runs/own" --minutes "$minutes" || return
  cp "$runs/own/config.json" "$runs/own/metrics.jsonl" "$runs/own/timing.jsonl" "$work"
  tail -1 "$runs/own/timing.jsonl"
  "$python" eval.py --workdir "$runs/own" && tr -d '\n' <"$runs/own/eval/metrics.json"
}

# NAME SECONDS COMMAND...: a part, in no more than these seconds and those that are left of all.
part() {
  local name=$1 limit=$2 left=$((total - SECONDS + began)) start=$SECONDS status
  shift 2
  if [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
  if [ "$left" -lt 10 ]; then return; fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  # The trap makes bash wait for a training that saves before it ends.
  timeout --kill-after 20 "$limit" bash -c "trap : TERM; $functions; $*" >"$work/$name.log" 2>&1
  status=$?
  printf '{"part": "%s", "status": %d, "seconds": %d, "result": %s}\n' "$name" "$status" \
    $((SECONDS - start)) "$(grep '^{.*}$' "$work/$name.log" | tail -1 | grep . || echo null)" \
    | tee -a "$out/gpu.jsonl"
  tar -C "$work" -czf "$out/files.tar.gz" .
  if [ "$name" = environment ] && [ "$status" -ne 0 ]; then
    tail -5 "$work/$name.log" >&2
    exit 1
  fi
}

functions="set -uo pipefail; $(declare -f environment tests step prediction own)"
functions+="; $(declare -p python platform canvas rounds data work runs minutes)"
part environment 40 environment
part "step$small" 140 step "$small"
part prediction1 80 prediction 1
part tests 100 tests
part own 240 own
part "step$large" 120 step "$large"
part "prediction$large" 80 prediction "$large"
exit 0
