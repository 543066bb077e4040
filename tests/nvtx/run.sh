#!/bin/bash
# Runs the cases of ranges_test and gil.py under the preloaded library, each in a process of its own.
# run.sh EACH_CASE PROGRAM TOOL LIBRARY LIBCUDA GIL_PY EXTENSION
set -u
source "$1"
program=$(realpath "$2")
tool=$(realpath "$3")
library=$(realpath "$4")
simulated=$(simulated_libraries "$(dirname "$(realpath "$5")")")
rules='weights: nvtx(load*), nvtx(größe); kv_cache=none: nvtx(cache@engine); -: nvtx(scratch);'
rules+='plain: nvtx(plain@)'

cases() {
  local filter=$1 name
  shift
  for name in $(gtest_cases "$program" "$filter"); do
    run_case "$name" env $simulated LC_ALL=C.UTF-8 LD_PRELOAD="$library" "$@" \
      "$program" --gtest_filter="$name"
  done
}

export LD_LIBRARY_PATH=${simulated#LD_LIBRARY_PATH=}  # for listing
cases 'Ranges.*' DORMOUSE_REGIONS="$rules"
cases 'SwitchedOff.*' DORMOUSE_REGIONS="$rules" DORMOUSE_NVTX=off
cases 'WithoutARule.*' DORMOUSE_REGIONS='weights: api'
cases 'WithATool.*' DORMOUSE_REGIONS="$rules" NVTX_INJECTION64_PATH="$tool" TOOL="$tool"
cases 'WithAToolThatDoesNotLoad.*' DORMOUSE_REGIONS="$rules" NVTX_INJECTION64_PATH=/nowhere/tool.so
for name in $(gtest_cases "$program" 'LoadedByNvtxAlone.*'); do
  run_case "$name" env $simulated NVTX_INJECTION64_PATH="$library" DORMOUSE_REGIONS="$rules" "$program" --gtest_filter="$name"
done
for python in ${DORMOUSE_TEST_PYTHONS:-python3}; do
  for name in $(sed -n 's/^def \(.*\)(\(path\|_\)):$/\1/p' "$6"); do
    run_case "$(basename "$python"): $name" timeout 30 env -u DORMOUSE_TEST_PYTHONS $simulated LD_PRELOAD="$library" \
      DORMOUSE_REGIONS="$rules" "$python" "$6" "$name" "$(realpath "$7")"
  done
done
finish
