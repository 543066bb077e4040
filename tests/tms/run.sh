#!/bin/bash
# torch_memory_saver's functions, through its package. DORMOUSE_TEST_TMS names a folder that contains the
# unpacked package (pip install --no-deps --target); DORMOUSE_TEST_PYTHON the interpreter, python3
# if unset.
# run.sh EACH_CASE TEST LIBRARY LIBCUDA
set -u
source "$1"
if [ -z "${DORMOUSE_TEST_TMS:-}" ]; then
  skip "torch_memory_saver: DORMOUSE_TEST_TMS does not name a folder with the package"
  finish
  exit
fi
test=$(realpath "$2")
folder=$(mktemp -d "${TEST_TMPDIR:-/tmp}/tms.XXXXXX")
# Its Python package looks for its own name in LD_PRELOAD.
cp "$(realpath "$3")" "$folder/torch_memory_saver_dormouse.so"
status=0
env $(simulated_libraries "$(dirname "$(realpath "$4")")") TMS_PACKAGE="$DORMOUSE_TEST_TMS" \
  DORMOUSE_HASH=off LD_PRELOAD="$folder/torch_memory_saver_dormouse.so" \
  "${DORMOUSE_TEST_PYTHON:-python3}" "$test" -v || status=$?
rm -rf "$folder"
exit "$status"
