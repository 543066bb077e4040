"""10,000 rounds on 8 threads of everything that regions and PyTorch's allocator can do to each other, in a real PyTorch.

programs/segments_soak.py does it and checks the allocator's own history of the whole run: expandable segments are suspended
for exactly the regions, and no cached block crosses a region's border.
"""
import os
import sys

import harness
from harness import PROGRAMS, case, check, check_equal, environment, figure, last_json, run_program

REGIONS = (
    "weights: nvtx(load_weights), api, python(soak_regions:load), python(soak_regions:parts), "
    "python(soak_regions:loading); kv_cache: api"
)
ALLOC_CONF = "expandable_segments:True,max_split_size_mb:256"
ACTIONS = [
    "outside", "in_api", "in_pushed_range", "in_started_range", "in_function", "nested", "interleaved", "ended_another_way",
    "exception", "generator_closed_early", "context_manager", "thread_that_ends_inside", "on_two_streams", "in_own_pool",
    "autograd", "check_settings", "out_of_memory_inside", "empty_cache", "empty_cache_inside", "graph",
]


@case
def no_segment_is_of_the_wrong_kind_and_no_cached_block_crosses_a_border():
    if "SIMGPU_MEMORY" not in os.environ:  # run.sh of tests/torch has a PyTorch that runs on the simulated driver
        harness.needs_torch()
    env = environment(REGIONS, PYTORCH_CUDA_ALLOC_CONF=ALLOC_CONF)
    rounds, seconds = harness.settings["rounds"], harness.settings["seconds"]
    command = [sys.executable, PROGRAMS / "segments_soak.py", "--rounds", rounds, "--seconds", seconds]
    seen = last_json(run_program(command, env, seconds + 90, "segments_soak.py"), "segments_soak.py")
    figure("seconds", seen["seconds"])
    figure("rounds", seen["rounds"])
    figure("changes_of_settings", seen["changes"])
    figure("history", seen["history"])
    figure("done", seen["done"])
    check_equal(seen["problems"], [], "problems")
    check(seen["rounds"] >= rounds, f"only {seen['rounds']} of {rounds} rounds were done in {seconds} s")
    check(seen["changes"] > 1, "the settings were never changed while the threads ran")
    for kind in ("weights plain segments", "kv_cache plain segments", "outside expandable segments", "graph blocks"):
        check(seen["history"].get(kind, 0) > 0, f"there are no {kind}")
    missing = [action for action in ACTIONS if action not in seen["done"]] if rounds >= 1000 else []
    check_equal(missing, [], "what was never done")


if __name__ == "__main__":
    sys.exit(harness.main("segments_long", rounds=10000, seconds=180))
