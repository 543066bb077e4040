# For test scripts: runs every case in a process of its own and counts. To be sourced.
passed=0
failed=0
skipped=0

# run_case NAME COMMAND...: one case.
run_case() {
  local name=$1 output
  shift
  output=$(mktemp "${TEST_TMPDIR:-/tmp}/case.XXXXXX")
  if "$@" >"$output" 2>&1; then
    if grep -q '^\[  SKIPPED \]' "$output"; then
      skipped=$((skipped + 1))
      echo "skipped: $name"
    else
      passed=$((passed + 1))
      echo "passed: $name"
    fi
  else
    failed=$((failed + 1))
    echo "FAILED: $name"
    sed 's/^/    /' "$output"
  fi
  rm -f "$output"
}

skip() {
  skipped=$((skipped + 1))
  echo "skipped: $1"
}

# gtest_cases PROGRAM FILTER: the names of its cases.
gtest_cases() {
  "$1" --gtest_filter="$2" --gtest_list_tests | awk '/^[^ ]/ { suite = $1 } /^  / { print suite $1 }'
}

finish() {
  echo "$passed passed, $failed failed, $skipped skipped"
  [ "$failed" -eq 0 ]
}

# simulated_libraries FOLDER: what programs find their libcuda and libcudart by; nothing on a machine
# whose GPU is to be used (DORMOUSE_TEST_GPU).
simulated_libraries() {
  [ -n "${DORMOUSE_TEST_GPU:-}" ] || echo "LD_LIBRARY_PATH=$1${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
}
