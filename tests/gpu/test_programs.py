"""The small CUDA programs of tests/programs under the library: same output as without, and they sleep from outside.

Runs on a GPU; without one on the simulated driver that scripts/gpu pack puts beside the library.
"""
import os
import sys

import harness
from harness import (
    MIB, Program, built, case, check, check_equal, dormouse, environment, run_program, status, tag_sum, wait_until,
)


def cuda_libraries():
    """LD_LIBRARY_PATH for libcuda.so.1 and libcudart.so.13: the machine's own if there is a GPU."""
    try:
        harness.needs_gpu()
    except harness.Skip:
        built("sim/libcuda.so.1")
        return str(harness.BUILD / "sim")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return f"{home}/lib64:{os.environ.get('LD_LIBRARY_PATH', '')}"


def same_output(name):
    program = built(name)
    libraries = cuda_libraries()
    alone = run_program([program], environment(preload=False, LD_LIBRARY_PATH=libraries), 60, name)
    check(alone != "", f"{name} printed nothing")
    under = run_program([program], environment("all: process", LD_LIBRARY_PATH=libraries), 60, name)
    check_equal(under, alone, f"output of {name} with all its memory tagged")
    idle = run_program([program], environment("none: api", LD_LIBRARY_PATH=libraries), 60, name)
    check_equal(idle, alone, f"output of {name} with no memory tagged")


@case
def a_program_on_the_bare_driver_is_as_it_was():
    same_output("alloc_check_driver")


@case
def a_program_that_looks_the_driver_up_is_as_it_was():
    same_output("alloc_check_dlsym")


@case
def a_program_on_the_runtime_is_as_it_was():
    same_output("alloc_check_dynamic")


@case
def a_server_sleeps_and_wakes_with_the_same_checksums():
    libraries = cuda_libraries()
    arguments = [built("serve"), "256", "16"]
    with Program(arguments, environment(preload=False, LD_LIBRARY_PATH=libraries), "serve") as program:
        program.expect("ready")
        expected = [program.ask("step", "step") for _ in range(4)]
    with Program(arguments, environment("weights: nvtx(weights)", LD_LIBRARY_PATH=libraries), "serve") as program:
        program.expect("ready")
        check_equal(program.ask("step", "step"), expected[0], "first step")
        check(tag_sum(status(program.pid), "weights", "allocated") >= 256 * MIB, "the weights are not tagged")
        free_before = int(program.ask("info", "free").split()[0])
        dormouse("sleep", "--tags", "weights", program.pid)
        check(tag_sum(status(program.pid), "weights", "asleep") >= 256 * MIB, "the weights are not asleep")
        freed = int(program.ask("info", "free").split()[0]) - free_before
        check(freed >= 250 * MIB, f"free memory rose by {freed >> 20} MiB")
        program.send("step")
        wait_until(lambda: status(program.pid)["gate"]["waiting_threads"] > 0, "a thread waits at the gate")
        check(program.next_line("step", 1.0) is None, "the server went on while its weights were asleep")
        dormouse("wake", program.pid)
        check_equal(program.expect("step"), expected[1], "the step that waited")
        dormouse("sleep", program.pid)
        dormouse("wake", program.pid)
        check_equal(program.ask("step", "step"), expected[2], "a step after another sleep")
        check_equal(program.finish(), 0, "exit status")


if __name__ == "__main__":
    sys.exit(harness.main("programs"))
