#!/bin/bash
# Each preset on stand-ins for the programs that it knows, on the simulated driver; with the first and the last of the
# Pythons that DORMOUSE_TEST_PYTHONS names (separated by white space), else python3.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
library=$(realpath "${DORMOUSE_TEST_LIBRARY:-shim/libdormouse.so}")
driver=$(realpath "${DORMOUSE_TEST_SIMGPU:-tests/simgpu}")
# shellcheck disable=SC2206  # words
pythons=(${DORMOUSE_TEST_PYTHONS:-python3})
unset "${!DORMOUSE_TEST_@}"  # not for the programs
failed=0

run() { # preset, generation, test case, variables
  env "${@:4}" LD_PRELOAD="$library" LD_LIBRARY_PATH="$driver" PYTHONPATH="$here/standins" PYTHONDONTWRITEBYTECODE=1 \
    DORMOUSE_CONTROL=off DORMOUSE_REGIONS="$1" STANDIN_GENERATION="$2" \
    PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64,expandable_segments:True "$python" "$here/presets.py" "$3" 2>&1
}

silent() { # as run(): nothing is said of what the program has or has not
  local out
  out=$(run "$@")
  ! grep -F "dormouse[" <<<"$out" || { echo "FAILED: something is said for $*: $out"; failed=1; }
}

expect() { # what the output must have once, then as run()
  local out
  out=$(run "${@:2}") || { echo "FAILED: ${*:2}"; failed=1; echo "$out"; }
  [[ $(grep -c -F -- "$1" <<<"$out") == 1 ]] || { echo "FAILED: '$1' is not there once for ${*:2}: $out"; failed=1; }
}

check_presets() {
  for generation in refuses switches rewrites; do
    expect OK @vllm:replace $generation Refused DORMOUSE_HOST_LIMIT=4MiB
    expect OK @vllm $generation Kept
    expect OK @vllm:replace $generation Replaced
    expect OK @vllm:server $generation Server
  done
  expect OK "weights: python(loader:load)" refuses Rule
  expect OK @sglang refuses MemorySaver
  expect OK @transformers refuses Transformers
  silent @transformers refuses Transformers
  local rules="weights: python(loader:load); @transformers"
  expect "python(loader:load) took effect" "$rules" refuses Rule DORMOUSE_LOG_LEVEL=info
  expect "python(transformers.cache_utils:DynamicLayer.update) of the preset @transformers never took effect: its module was not" \
    "$rules" refuses Rule DORMOUSE_LOG_LEVEL=info
  expect "the preset @vllm:replace took effect in vllm.device_allocator.cumem" @vllm:replace rewrites Replaced \
    DORMOUSE_LOG_LEVEL=info
  expect "the preset @vllm does not fit the installed vllm 0.0.1: there is no vllm.device_allocator.cumem:CuMemAllocator.use_memory_pool" \
    @vllm renamed Misfit
  expect "@vllm:replace does not fit" @vllm:replace renamed Misfit
  expect "allocator has no memory pools" "weights: api" refuses OldPyTorch
  expect "python(nowhere.x:f): there is no module nowhere on Python's path" \
    "w: python(nowhere.x:f), python(loader:load)" refuses Nowhere
  expect "there is no module" "w: python(nowhere:f), python(loader:load)" refuses Nowhere
  expect "@vllm is ignored, since @vllm:replace is there too" "@vllm; @vllm:replace" rewrites Replaced
}

python=${pythons[0]}
check_presets
if [ ${#pythons[@]} -gt 1 ]; then
  python=${pythons[-1]}
  check_presets
fi
exit $failed
