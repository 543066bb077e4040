"""Expandable segments are suspended for exactly the regions, on exactly the thread, in a real PyTorch."""
import sys

import harness
from harness import PROGRAMS, case, check, check_equal, environment, figure, last_json, run_program

REGIONS = "weights: nvtx(load_weights), api"
ALLOC_CONF = "expandable_segments:True,max_split_size_mb:256,garbage_collection_threshold:0.9"


def run(name, *arguments, timeout=200, variable="PYTORCH_CUDA_ALLOC_CONF"):
    harness.needs_torch()
    env = environment(REGIONS, **{variable: ALLOC_CONF})
    return last_json(run_program([sys.executable, PROGRAMS / name, *arguments], env, timeout, name), name)


def check_settings(seen):
    check(seen["inside_count"] > 10 and seen["outside_count"] > 10, f"too little was allocated: {seen}")
    check_equal(seen["inside_expandable"], 0, "expandable segments among those allocated in regions")
    check_equal(seen["outside_plain"], 0, "plain segments among those allocated outside, by two threads")
    check_equal(seen["pools_with_both"], [], "pools with both kinds of segments")
    check_equal(seen["outside"]["expandable_segments"], True, "expandable_segments outside")
    check_equal(seen["inside"]["expandable_segments"], False, "expandable_segments inside")
    others = {name: value for name, value in seen["outside"].items() if name != "expandable_segments"}
    inside = {name: value for name, value in seen["inside"].items() if name != "expandable_segments"}
    check_equal(inside, others, "all other settings inside a region")
    check_equal(seen["after"], seen["outside"], "settings after the regions")


@case
def segments_in_regions_are_plain_and_all_others_expandable_while_a_second_thread_allocates():
    seen = run("region_settings.py")
    check_settings(seen)
    figure("region_begin_and_end_ns", seen["begin_end_ns"])


@case
def the_same_where_the_setting_comes_by_the_newer_variable():
    check_settings(run("region_settings.py", variable="PYTORCH_ALLOC_CONF"))


def run_threads(watch):
    seen = run("mixed_threads.py", "--watch", watch, "--rounds", harness.settings["rounds"],
               timeout=harness.settings["seconds"])
    figure("seconds", seen["seconds"])
    figure("changes_of_settings", seen["changes"])
    check_equal(seen["problems"], [], "problems")
    check(seen["changes"] > 1, "the settings were never changed while the threads ran")
    return seen["history"]


@case
def eight_threads_make_no_segment_of_the_wrong_kind_while_the_settings_change():
    history = run_threads("history")
    figure("history", history)
    check(history.get("inside segment_alloc", 0) > 0, f"nothing was allocated inside: {history}")
    check(history.get("outside segment_map", 0) > 0, f"nothing was allocated outside: {history}")
    check_equal(history.get("inside segment_map", 0), 0, "expandable segments made inside regions")
    check_equal(history.get("outside segment_alloc", 0), 0, "plain segments made outside regions")


@case
def eight_threads_read_the_settings_that_were_asked_for_at_every_moment():
    run_threads("snapshots")


if __name__ == "__main__":
    sys.exit(harness.main("segments", rounds=3000, seconds=240))
