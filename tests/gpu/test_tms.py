"""torch_memory_saver's own Python package, loading this library in place of its own.

Needs the package (from PyPI) on Python's path. Its own library runs the same program for comparison.
"""
import sys

import harness
from harness import (
    MIB, PROGRAMS, Skip, built, case, check, check_equal, environment, figure, gib, last_json, run_program,
    saver_library,
)

# Any path with this name in it is taken by the package for its own library.
OURS = "libtorch_memory_saver_dormouse.so"


def run(lib, **variables):
    env = environment(lib=lib, **variables)
    arguments = [sys.executable, PROGRAMS / "saver.py", "--gib", str(harness.settings["gib"])]
    return last_json(run_program(arguments, env, 240, "saver.py"), "saver.py")


def needs():
    harness.needs_torch()
    harness.needs_module("torch_memory_saver")


def check_contents(seen):
    check(all(seen["same"]), f"contents after resume: {seen['same']}")
    check(all(seen["backup_same"]), f"get_cpu_backup: {seen['backup_same']}")
    check(seen["outside_same"], "memory outside the regions changed")
    check(seen["addresses_same"], "addresses changed")
    check(seen["cache_usable"], "the tag without backup cannot be used after resume")


def check_freed(seen):
    for freed in seen["freed"]:
        check(abs(freed - seen["bytes"]) <= 128 * MIB, f"pause freed {gib(freed)} of {gib(seen['bytes'])}")
    check(seen["freed_both"] >= 2 * seen["bytes"] - 256 * MIB, f"both tags freed {gib(seen['freed_both'])}")


def show(seen, name):
    for what in ("pause_seconds", "resume_seconds", "freed"):
        figure(f"{name}_{what}", [round(value, 4) for value in seen[what]])


@case
def its_package_pauses_and_resumes_on_our_library():
    needs()
    seen = run(built(OURS))
    check_contents(seen)
    check_freed(seen)
    show(seen, "ours")


@case
def with_expandable_segments_on_its_regions_still_free_their_memory():
    needs()
    # By this name of the variable the package's own check does not see the setting.
    seen = run(built(OURS), PYTORCH_ALLOC_CONF="expandable_segments:True")
    check_contents(seen)
    check_freed(seen)
    check_equal(seen["inside_expandable"], 0, "expandable segments in its regions")
    check(seen["outside_expandable"], "segments outside its regions are not expandable")
    show(seen, "ours_expandable")


@case
def its_own_library_for_comparison():
    needs()
    seen = run(saver_library())
    check_contents(seen)
    show(seen, "peer")


@case
def its_own_library_with_expandable_segments_for_comparison():
    needs()
    try:
        seen = run(saver_library(), PYTORCH_ALLOC_CONF="expandable_segments:True")
    except AssertionError as error:
        raise Skip(f"it does not run so: {str(error).splitlines()[-1]}") from None
    show(seen, "peer_expandable")


if __name__ == "__main__":
    sys.exit(harness.main("tms", gib=2.0))
