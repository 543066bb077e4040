#!/bin/bash
# The view of PyTorch, on real PyTorch, under the preloaded library. What is not named is skipped:
#   DORMOUSE_TEST_PYTHON      an interpreter with PyTorch 2.10 or later (a CPU build will do)
#   DORMOUSE_TEST_TORCH_CUDA  a folder with an unpacked CUDA build of 2.10 or later, whose Python
#                             dependencies the interpreter above has
#   DORMOUSE_TEST_TORCH_G2    folders with libc10 and its headers of further versions from 2.10 on, separated by colons
#   DORMOUSE_TEST_TORCH_G1    folders with unpacked CUDA builds of 2.4 to 2.9, separated by colons
#   DORMOUSE_TEST_VLLM        folders with the allocators of vLLM, named vllm-VERSION, separated by colons
#   DORMOUSE_TEST_SGLANG      folders with SGLang's adapters of torch_memory_saver, named sglang-VERSION, the same
#   DORMOUSE_TEST_TMS         a folder with torch_memory_saver's Python package
# run.sh PART EACH_CASE SOURCE LIBRARY LIBCUDA [COMMAND], where PART is accelerator, copies, symbols, setter, cuda,
# soak, vllm, sglang or compile; of copies SOURCE is a program, and two copies of a libc10 follow
set -u
source "$2"
part=$1
source_file=$(realpath "$3")
library=$(realpath "$4")
simulated=$(dirname "$(realpath "$5")")
command=${6:-}
copy_1=${6:-} copy_2=${7:-}
tests=$(dirname "$(dirname "$(realpath "$0")")")
scratch=$(mktemp -d "${TEST_TMPDIR:-/tmp}/torch.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

# The folder of the torch package that an interpreter imports.
torch_folder() {
  "$DORMOUSE_TEST_PYTHON" -c 'import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec("torch").origin).parent)'
}

accelerator() {
  if [ -z "${DORMOUSE_TEST_PYTHON:-}" ]; then
    skip "PyTorch 2.10 and later: DORMOUSE_TEST_PYTHON is not set"
    return
  fi
  local torch folder
  torch=$(torch_folder) || exit 1
  accelerator_of "$torch" ""
  [ -n "${DORMOUSE_TEST_TORCH_G2:-}" ] || skip "further versions from 2.10 on: DORMOUSE_TEST_TORCH_G2 names none"
  folder=${DORMOUSE_TEST_TORCH_CUDA:-}
  [ -z "$folder" ] || accelerator_of "$folder/torch" "$(basename "$folder"): "
  for folder in ${DORMOUSE_TEST_TORCH_G2//:/ }; do accelerator_of "$folder/torch" "$(basename "$folder"): "; done
}

# The keys in the table of docs/regions.md.
region_keys() {
  awk -F'`' '/^\| key \|/ { inside = 1; next } inside && /^\| `/ { print $2; next } inside && !/^\| ---/ { exit }' \
    "$tests/../docs/regions.md"
}

# accelerator_of TORCH PREFIX: the cases on one PyTorch, and what stands before their names.
accelerator_of() {
  local torch=$1 prefix=$2 name names
  local all=garbage_collection_threshold:0.25,large_segment_size_mb:32,max_non_split_rounding_mb:128,max_split_size_mb:300
  all+=,pinned_max_cached_size_mb:8,pinned_max_round_threshold_mb:4,pinned_use_background_threads:True
  all+=,roundup_power2_divisions:4
  g++ -std=c++20 -O2 -I"$torch/include" "$source_file" -o "$scratch/program" -L"$torch/lib" -lc10 \
    -Wl,-rpath,"$torch/lib" -lgtest -lgtest_main -lpthread -ldl || exit 1
  names=$(gtest_cases "$scratch/program" '*') || exit 1
  for name in $names; do
    local settings=()
    case $name in
      *FollowsTheEnvironment*)
        settings=(PYTORCH_ALLOC_CONF=expandable_segments:True,max_split_size_mb:200) ;;
      *ARegionCanHave* | *SettingsOfARegion*)
        settings=(DORMOUSE_REGIONS='weights{max_split_size_mb:300}: api') ;;
      *ATagOfTheWholeProcess*)
        settings=(DORMOUSE_REGIONS='weights: process') ;;
      *EveryKey* | *EverySetting* | *UnroundedPinned*)
        settings=(DORMOUSE_REGIONS="all{$all}: api; none{pinned_use_background_threads:False}: api"
          DORMOUSE_LOG_FILE="$scratch/log" TEST_REGION_KEYS="$(region_keys)") ;;
    esac
    rm -f "$scratch/log"
    run_case "$prefix$name" env "${settings[@]}" LD_PRELOAD="$library" "$scratch/program" \
      --gtest_filter="$name"
  done
}

# Two copies of a libc10 of our own making.
copies() {
  local name option
  export COPIES
  COPIES=$(realpath "$copy_1"):$(realpath "$copy_2")
  for name in $(gtest_cases "$source_file" 'Copies.*'); do
    run_case "$name" env LD_PRELOAD="$library" "$source_file" --gtest_filter="$name"
  done
  for name in $(gtest_cases "$source_file" 'SwitchedOff.*'); do
    for option in DORMOUSE=off DORMOUSE_TORCH=off; do
      run_case "$name, $option" env "$option" LD_PRELOAD="$library" "$source_file" --gtest_filter="$name"
    done
  done
}

# is_symbol LIBRARY SYMBOL KIND: it is of this kind among the library's dynamic symbols, as nm has it: U undefined, u unique
# (one for the process), none: not there.
is_symbol() {
  local found
  found=$(set -o pipefail && nm -D "$1" | awk -v symbol="$2" '$NF == symbol { print $(NF - 1) }') || return 1
  [ "${found:-none}" = "$3" ] || { echo "$2: ${found:-none}, not $3" && return 1; }
}

# Which keys a thread can have for itself: those that PyTorch reads from an object that it gets by a call across libraries.
# docs/design.md says more.
symbols() {
  local config=_ZN3c104cuda20CUDACachingAllocator19CUDAAllocatorConfig folder library path none=1 old=${DORMOUSE_TEST_TORCH_G1:-}
  local accelerator=_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig8instanceEv
  for folder in ${DORMOUSE_TEST_TORCH_CUDA:-} ${old//:/ }; do
    for library in libc10_cuda libtorch_cuda libtorch_python; do
      path=$folder/torch/lib/$library.so
      [ -e "$path" ] || continue
      none=0
      if [ "$folder" = "${DORMOUSE_TEST_TORCH_CUDA:-}" ]; then
        run_case "$(basename "$folder"): $library asks libc10 for its settings" is_symbol "$path" "$accelerator" U
      fi
      [ "$library" != libtorch_python ] || continue
      run_case "$(basename "$folder"): $library asks nobody for the CUDA library's settings" \
        is_symbol "$path" "${config}8instanceEv" none
      run_case "$(basename "$folder"): $library reads them from one place for all threads" \
        is_symbol "$path" "_ZZ${config#_Z}8instanceEvE10s_instance" u
    done
  done
  [ "$none" = 0 ] || skip "PyTorch's CUDA libraries: DORMOUSE_TEST_TORCH_CUDA and DORMOUSE_TEST_TORCH_G1 name none"
}

setter_regions() {
  case $1 in
    settings_of_a_region*) echo 'weights{max_split_size_mb:300}: api' ;;
    of_two_regions*) echo 'a{max_split_size_mb:300}: api; b{max_split_size_mb:400}: api; c: api' ;;
    a_key_that_this_version*)
      echo 'unknown{large_segment_size_mb:32,max_non_split_rounding_mb:64,pinned_max_cached_size_mb:8,max_split_size_mb:300}:'
      echo 'api; nothing{pinned_max_round_threshold_mb:8}: api' ;;
    pinned_memorys*)
      echo 'weights{pinned_use_background_threads:True,max_split_size_mb:300}: api; other{max_split_size_mb:400}: api' ;;
    a_tag_of_the_whole_process*) echo 'weights: process' ;;
    a_thread_whose_name*) echo 'weights: thread(loader*)' ;;
    a_library_that_begins*) echo 'weights{max_non_split_rounding_mb:64}: api' ;;
  esac
}

setter() {
  if [ -z "${DORMOUSE_TEST_TORCH_G1:-}" ]; then
    skip "PyTorch 2.4 to 2.9: DORMOUSE_TEST_TORCH_G1 is not set"
    return
  fi
  local folder name names abi
  printf '%s\n' 'extern "C" void setter_check_initialiser();' \
    '__attribute__((constructor)) static void initialise() { setter_check_initialiser(); }' >"$scratch/plugin.cc"
  g++ -shared -fPIC "$scratch/plugin.cc" -o "$scratch/plugin.so" || exit 1
  for folder in ${DORMOUSE_TEST_TORCH_G1//:/ }; do
    local lib=$folder/torch/lib
    abi=1
    nm -D "$lib/libc10_cuda.so" | grep -q setAllocatorSettingsERKSs && abi=0
    g++ -std=c++20 -O1 -D_GLIBCXX_USE_CXX11_ABI=$abi -DPYTORCH_C10_DRIVER_API_SUPPORTED \
      -I"$folder/torch/include" -I"${CUDA_HOME:-/usr/local/cuda}/include" "$source_file" \
      -o "$scratch/program" -L"$lib" -lc10_cuda -lc10 -Wl,-rpath,"$lib" \
      -Wl,--allow-shlib-undefined,--export-dynamic -lpthread -ldl || exit 1
    names=$(LD_LIBRARY_PATH=$simulated "$scratch/program") || exit 1
    for name in $names; do
      rm -f "$scratch/log"
      run_case "$(basename "$folder"): $name" env DORMOUSE_REGIONS="$(setter_regions "$name")" \
        DORMOUSE_LOG_FILE="$scratch/log" SETTER_PLUGIN="$scratch/plugin.so" \
        LD_LIBRARY_PATH="$simulated" LD_PRELOAD="$library" "$scratch/program" "$name"
    done
  done
}

# Sets `path`: the environment in which the CUDA build loads, on the simulated driver unless a GPU is to be used. False
# if there is no build.
cuda_build() {
  if [ -z "${DORMOUSE_TEST_TORCH_CUDA:-}" ] || [ -z "${DORMOUSE_TEST_PYTHON:-}" ]; then
    skip "PyTorch's CUDA build: DORMOUSE_TEST_TORCH_CUDA or DORMOUSE_TEST_PYTHON is not set"
    return 1
  fi
  path=(PYTHONPATH="$DORMOUSE_TEST_TORCH_CUDA" PYTHONDONTWRITEBYTECODE=1)
  [ -z "${DORMOUSE_TEST_GPU:-}" ] || return 0
  "$DORMOUSE_TEST_PYTHON" "$tests/torch/make_stubs.py" \
    "$DORMOUSE_TEST_TORCH_CUDA/torch/lib" "$simulated" "$scratch/stubs" >/dev/null || exit 1
  path+=(LD_LIBRARY_PATH="$simulated:$scratch/stubs" SIMGPU_MEMORY=8GiB)
}

cuda() {
  local path
  cuda_build || return
  env "${path[@]}" DORMOUSE_HASH=off LD_PRELOAD="$library" "$DORMOUSE_TEST_PYTHON" "$source_file" -v || exit 1
  exit 0  # unittest has said what there is to say
}

compile() {
  if [ -z "${DORMOUSE_TEST_PYTHON:-}" ]; then
    skip "torch.compile: DORMOUSE_TEST_PYTHON is not set"
    return
  fi
  env PYTHONDONTWRITEBYTECODE=1 LD_PRELOAD="$library" DORMOUSE_REGIONS="w: python(compiled:twice), python(compiled:look)" \
    "$DORMOUSE_TEST_PYTHON" "$source_file" -v || exit 1
  exit 0
}

soak() {
  local path
  cuda_build || return
  mkdir "$scratch/gpu"
  ln -s "$library" "$scratch/gpu/"
  run_case "10,000 rounds" env "${path[@]}" SIMGPU_MEMORY=24GiB GPU_BUILD="$scratch/gpu" "$DORMOUSE_TEST_PYTHON" "$source_file"
}

vllm() {
  local path
  cuda_build || return
  if [ -z "${DORMOUSE_TEST_VLLM:-}" ]; then
    skip "vLLM's allocators: DORMOUSE_TEST_VLLM is not set"
    return
  fi
  gpu_cases "$DORMOUSE_TEST_VLLM" --gib 0.25 --cache-gib 0.125
}

sglang() {
  local path
  cuda_build || return
  if [ -z "${DORMOUSE_TEST_SGLANG:-}" ] || [ -z "${DORMOUSE_TEST_TMS:-}" ]; then
    skip "SGLang's adapters: DORMOUSE_TEST_SGLANG or DORMOUSE_TEST_TMS is not set"
    return
  fi
  path[0]+=":$DORMOUSE_TEST_TMS"
  gpu_cases "$DORMOUSE_TEST_SGLANG" --gib 0.25 --cache-gib 0.125
}

# gpu_cases FOLDERS OPTION...: the cases of a GPU test, with these folders (separated by colons) where it looks for them.
gpu_cases() {
  local folder name names program=("$DORMOUSE_TEST_PYTHON" "$source_file")
  mkdir "$scratch/gpu"
  ln -s "$library" "$(realpath "$command")" "$scratch/gpu/"
  ln -s "$library" "$scratch/gpu/libtorch_memory_saver_dormouse.so"
  for folder in ${1//:/ }; do ln -s "$folder" "$scratch/gpu/"; done
  names=$("${program[@]}" --list) || exit 1
  for name in $names; do
    run_case "$name" env "${path[@]}" GPU_BUILD="$scratch/gpu" "${program[@]}" "${@:2}" "$name"
  done
}

"$part"
finish
