"""What a fragmenting workload reserves with expandable segments off, on, and suspended by regions."""
import sys

import harness
from harness import PROGRAMS, case, check, environment, figure, gib, last_json, run_program

REGIONS = "weights: nvtx(load_weights); kv_cache=none: nvtx(kv_cache)"


def run(name, expandable, preload):
    env = environment(REGIONS if preload else None, preload=preload,
                      PYTORCH_CUDA_ALLOC_CONF=f"expandable_segments:{expandable}")
    arguments = [sys.executable, PROGRAMS / "fragment.py", "--steps", harness.settings["steps"]]
    seen = last_json(run_program(arguments, env, 240, name), name)
    figure(name, seen)
    return seen


def print_table(rows):
    print(f"    {'expandable segments':24}{'peak reserved':>15}{'peak in use':>14}{'in use at OOM':>15}{'seconds':>9}")
    for name, seen in rows.items():
        print(f"    {name:24}{gib(seen['peak_reserved']):>15}{gib(seen['peak_allocated']):>14}"
              f"{gib(seen['oom_allocated']):>15}{seen['seconds']:>9.2f}")


@case
def regions_cost_at_most_two_percent_over_expandable_segments_everywhere():
    harness.needs_torch()
    rows = {
        "off everywhere": run("off everywhere", False, False),
        "on everywhere": run("on everywhere", True, False),
        "suspended by regions": run("suspended by regions", True, True),
    }
    print_table(rows)
    everywhere, regions = rows["on everywhere"], rows["suspended by regions"]
    check(regions["plain"] > 0 and regions["expandable"] > 0, f"both kinds of segments were expected: {regions}")
    check(everywhere["plain"] == 0, f"expandable segments were not on everywhere: {everywhere}")
    for what in ("peak_reserved", "oom_allocated"):
        difference = abs(regions[what] - everywhere[what]) / everywhere[what]
        figure(f"{what}_difference", round(difference, 4))
    check(regions["peak_reserved"] <= everywhere["peak_reserved"] * 1.02,
          f"peak reserved is {gib(regions['peak_reserved'])} with regions, {gib(everywhere['peak_reserved'])} without")
    check(regions["oom_allocated"] >= everywhere["oom_allocated"] * 0.98,
          f"memory is out at {gib(regions['oom_allocated'])} with regions, {gib(everywhere['oom_allocated'])} without")


if __name__ == "__main__":
    sys.exit(harness.main("fragmentation", steps=4000))
