#!/bin/bash
# Each preset on stand-ins for the programs that it knows, on the simulated driver.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
library=$(realpath "${DORMOUSE_TEST_LIBRARY:-shim/libdormouse.so}")
driver=$(realpath "${DORMOUSE_TEST_SIMGPU:-tests/simgpu}")
failed=0

run() { # preset, generation, test case, variables
  env "${@:4}" LD_PRELOAD="$library" LD_LIBRARY_PATH="$driver" PYTHONPATH="$here/standins" PYTHONDONTWRITEBYTECODE=1 \
    DORMOUSE_CONTROL=off DORMOUSE_REGIONS="$1" STANDIN_GENERATION="$2" \
    PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64,expandable_segments:True python3 "$here/presets.py" "$3" 2>&1
}

expect() { # what the output must have once, then as run()
  local out
  out=$(run "${@:2}") || { echo "FAILED: ${*:2}"; failed=1; echo "$out"; }
  [[ $(grep -c -F -- "$1" <<<"$out") == 1 ]] || { echo "FAILED: '$1' is not there once for ${*:2}: $out"; failed=1; }
}

for generation in refuses switches rewrites; do
  expect OK @vllm:replace $generation Refused DORMOUSE_HOST_LIMIT=4MiB
  expect OK @vllm $generation Kept
  expect OK @vllm:replace $generation Replaced
done
expect OK "weights: python(loader:load)" refuses Rule
expect OK @sglang refuses MemorySaver
expect "the preset @vllm does not fit the installed vllm 0.0.1: there is no vllm.device_allocator.cumem:CuMemAllocator.use_memory_pool" \
  @vllm renamed Misfit
expect "@vllm:replace does not fit" @vllm:replace renamed Misfit
exit $failed
