#!/usr/bin/env bash
# Runs engine_cycles on the simulated driver. Arguments: the program, the simulated libcuda.so.1.
set -euo pipefail
program="$PWD/$1"
LD_LIBRARY_PATH="$(dirname "$PWD/$2")"
export LD_LIBRARY_PATH
disk=$(mktemp -d "${TEST_TMPDIR:-/tmp}/disk.XXXXXX")
trap 'rm -rf "$disk"' EXIT
"$program" --cycles 60 --mib 48 --seconds 120 --seed 1
"$program" --cycles 20 --mib 48 --seconds 120 --seed 2 --disk "$disk"
left=$(find "$disk" -type f)
if [ -n "$left" ]; then
  echo "files are left behind: $left" >&2
  exit 1
fi
