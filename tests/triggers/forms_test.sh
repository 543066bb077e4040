#!/bin/bash
# Every form of a Python trigger and every message about a rule that does not fit, on each Python found:
# those that DORMOUSE_TEST_PYTHONS names (separated by white space), else python3.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
library=$(realpath "${DORMOUSE_TEST_LIBRARY:-shim/libdormouse.so}")
driver=$(realpath "${DORMOUSE_TEST_SIMGPU:-tests/simgpu}")
embed=$(realpath "${DORMOUSE_TEST_EMBED:-tests/triggers/embed}")
pythons=${DORMOUSE_TEST_PYTHONS:-python3}
unset "${!DORMOUSE_TEST_@}"  # not for the programs
failed=0

fail() {
  echo "FAILED: $*"
  failed=1
}

# The names of zoo.animals as rules.
rules() {
  local IFS=,
  set -- "${@/#/python(zoo.animals:}"
  echo "${*/%/)}"
}

under_library() {
  LD_PRELOAD=$library PYTHONPATH=$here PYTHONDONTWRITEBYTECODE=1 DORMOUSE_REGIONS=$1 "${@:2}"
}

expect() { # rules, the message, the code to run
  local out
  out=$(under_library "$1" "$python" -c "$3" 2>&1) || fail "$version: $3 ended with $?: $out"
  [[ $(grep -c -F -- "$2" <<<"$out") == 1 ]] || fail "$version: '$2' is not there once in: $out"
}

check_messages() {
  local probe="import sys; sys.modules['zoo_probe'] = p = type(sys)('p'); p.tag = str"
  local import="$probe; import zoo.animals"
  expect "w: $(rules laod)" "zoo.animals has no laod, only load. The rule is ignored" "$import"
  expect "w: $(rules Cage.metod)" "Cage has no metod, only method" "$import"
  expect "w: $(rules thing)" "not a function, method or class" "$import"
  expect "w: python(zoo.animal:load)" "zoo has no module animal, only animals. The rule is ignored" "$probe; import zoo"
  expect "w: python(__main__:main)" "is run, not imported" "import json"
  expect "w: python(_datetime:date)" "cannot be replaced" "import _datetime"
  expect "w: python(types:SimpleNamespace)" "python(types:SimpleNamespace) cannot be replaced" "import types"
  expect "w: python(zoo.odd:x)" "got theirs" "import zoo.odd
try:
    zoo.odd.x
except RuntimeError as error:
    print('got', error)"
  expect "w: python(zoo.animals:load)" "ImportError" \
    "$probe
try:
    from zoo.animals import missing
except ImportError as error:
    print('ImportError')"
  expect "w: python(nowhere:f)" "Leave python(...) and presets out of DORMOUSE_REGIONS" \
    "import sys; sys.meta_path = tuple(sys.meta_path[::-1]); import json"
  local quiet
  quiet=$(under_library "w: python(nowhere:f)" "$python" -c "import json" 2>&1)
  [[ -z $quiet ]] || fail "$version: a module that is never imported is no matter: $quiet"
  # What the first imports of all bring.
  quiet=$(under_library "w: python(functools:reduce), python(types:new_class), python(contextlib:contextmanager), \
    python(re:compile), python(os:getcwd), python(collections:namedtuple), python(enum:unique)" "$python" -c "
import collections, contextlib, ctypes, enum, functools, os, re, types
depth = ctypes.CDLL(None).dormouse_region_depth
assert functools.reduce(lambda a, b: depth(), [0, 0]) == 1
assert types.new_class('A', exec_body=lambda names: names.update(d=depth())).d == 1" 2>&1) || fail "$version: early modules: $?"
  [[ -z $quiet ]] || fail "$version: early modules: $quiet"
  quiet=$(under_library "w: nvtx(x)" "$python" -c \
    "import sys; print([f for f in sys.meta_path if 'Finder' == type(f).__name__[-6:] and type(f).__name__ == '_Finder'])")
  [[ $quiet == "[]" ]] || fail "$version: without a rule nothing is loaded: $quiet"
}

# A Python that the program has loaded with RTLD_LOCAL.
check_embedded() {
  local home file out
  { read -r home && read -r file; } < <("$python" -c "
import os, sys, sysconfig
print(sys.base_prefix)
print(os.path.join(sysconfig.get_config_var('LIBDIR'), sysconfig.get_config_var('INSTSONAME')))")
  [[ $file == *.so* && -e $file ]] || { echo "SKIPPED: $version has no shared library"; return; }
  out=$(LD_LIBRARY_PATH=$driver PYTHONHOME=$home under_library "w: python(zoo.late:function)" "$embed" "$file" "
import sys
sys.modules['zoo_probe'] = p = type(sys)('p')
p.tag = str
import zoo.late
print('has the region:', hasattr(zoo.late.function, '__wrapped__'), flush=True)" 2>&1) || fail "$version: embedded, ended with $?: $out"
  [[ $out == "has the region: True" ]] || fail "$version: embedded: $out"
}

check_python() {
  python=$1
  version=$("$python" -c 'import sys; print(sys.version.split()[0])') || { echo "SKIPPED: no $python"; return; }
  local weights=(load fail Cage.method Cage.build Cage.helper Small.inherited Made MadeNew outer count talk
    fetch fetch_forever stream decorated returns_generator keeper async_keeper Gate leaks_a_region hold cached
    with_all_parameters registered closure warns)
  local text
  text="weights: $(rules "${weights[@]}"), python(zoo.reloaded:depth_inside), python(zoo.late:function)"
  text+=", python(zoo.lazy:Heavy.method), python(zoo.lazier:function), python(from_a_file:function), python(by_a_loader:function)"
  text+="; kv_cache: $(rules inner count_kv fetch_kv Cage.Inner.deep)"
  local flags
  for flags in "" "-S"; do
    under_library "$text" "$python" $flags "$here/forms.py" || fail "$version $flags: the forms"
  done
  check_messages
  check_embedded
  echo "checked: $version"
}

for each in $pythons; do check_python "$each"; done
exit $failed
