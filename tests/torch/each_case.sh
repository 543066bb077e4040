# For test scripts: runs every case in a process of its own, counts, and tells Bazel of each. To be sourced.
passed=0
failed=0
skipped=0
cases=()  # as elements of JUnit's XML

# add_case NAME ELEMENT: what became of it; nothing if it passed.
add_case() {
  local name=${1//&/&amp;}
  name=${name//</&lt;}
  cases+=("<testcase name=\"${name//\"/&quot;}\">$2</testcase>")
}

# run_case NAME COMMAND...: one case. It is skipped if it ends with 77 or GoogleTest says so.
run_case() {
  local name=$1 output status=0
  shift
  output=$(mktemp "${TEST_TMPDIR:-/tmp}/case.XXXXXX")
  "$@" >"$output" 2>&1 || status=$?
  if [ "$status" -eq 77 ] || { [ "$status" -eq 0 ] && grep -q '^\[  SKIPPED \]' "$output"; }; then
    skip "$name"
    sed 's/^/    /' "$output"
  elif [ "$status" -eq 0 ]; then
    passed=$((passed + 1))
    add_case "$name" ""
    echo "passed: $name"
  else
    failed=$((failed + 1))
    add_case "$name" "<failure/>"
    echo "FAILED: $name"
    sed 's/^/    /' "$output"
  fi
  rm -f "$output"
}

skip() {
  skipped=$((skipped + 1))
  add_case "$1" "<skipped/>"
  echo "skipped: $1"
}

# gtest_cases PROGRAM FILTER: the names of its cases.
gtest_cases() (
  set -o pipefail
  "$1" --gtest_filter="$2" --gtest_list_tests | awk '/^[^ ]/ { suite = $1 } /^  / { print suite $1 }'
)

# Fails too where no case ran.
finish() {
  echo "$passed passed, $failed failed, $skipped skipped"
  if [ -n "${XML_OUTPUT_FILE:-}" ]; then
    printf '<testsuites><testsuite name="cases">%s</testsuite></testsuites>\n' "${cases[*]}" >"$XML_OUTPUT_FILE"
  fi
  [ "$failed" -eq 0 ] && [ $((passed + skipped)) -gt 0 ]
}

# simulated_libraries FOLDER: what programs find their libcuda and libcudart by; nothing on a machine
# whose GPU is to be used (DORMOUSE_TEST_GPU).
simulated_libraries() {
  [ -n "${DORMOUSE_TEST_GPU:-}" ] || echo "LD_LIBRARY_PATH=$1${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
}
