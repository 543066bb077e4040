"""The main job: a PyTorch program that knows nothing of Dormouse goes to sleep and wakes from outside.

programs/generate.py runs under LD_PRELOAD and environment variables alone, with expandable segments on, and is asked for
tokens before, during and after sleeps that the dormouse command orders.
"""
import contextlib
import sys

import harness
from harness import (
    GIB, MIB, PROGRAMS, Program, case, check, check_equal, dormouse, environment, figure, gib, gpu_free, status, tag_sum,
    wait_until,
)

REGIONS = "weights: nvtx(load_weights); kv_cache=none: nvtx(kv_cache)"
ALLOC_CONF = "expandable_segments:True,max_split_size_mb:256"
# What may come and go on a GPU beside the weights: pieces that are rounded, a context that grows.
SLACK = 128 * MIB


def needs():
    harness.needs_torch()
    harness.needs_module("transformers")


def start(regions=REGIONS, preload=True, **variables):
    env = environment(regions, preload=preload, PYTORCH_CUDA_ALLOC_CONF=ALLOC_CONF, **variables)
    program = Program([sys.executable, PROGRAMS / "generate.py", "--layers", harness.settings["layers"]], env, "generate.py")
    program.weights = int(program.expect("ready", 180))
    return program


_shared = None


@contextlib.contextmanager
def server():
    """One program for the cases that leave it as it was, since starting takes most of the time; a new one after a failure."""
    global _shared
    if _shared is None:
        _shared = start()
    try:
        yield _shared
    except BaseException:
        failed, _shared = _shared, None
        failed.__exit__(*sys.exc_info())
        raise


def tokens(program):
    digest, seconds = program.ask("generate", "tokens").split()
    return digest, float(seconds)


_without = None


def tokens_without_library():
    """The digest that the program gives by itself; run once."""
    global _without
    if _without is None:
        with start(preload=False) as program:
            _without, _ = tokens(program)
            second, seconds = tokens(program)
            check_equal(second, _without, "tokens of a second request, without the library")
            figure("generate_seconds_without", seconds)
    return _without


def is_asleep(pid, tag="weights"):
    return tag_sum(status(pid), tag, "asleep")


@case
def weights_sleep_and_wake_from_outside_with_the_same_tokens():
    needs()
    expected = tokens_without_library()
    with server() as program:
        check_equal(tokens(program)[0], expected, "tokens under the library, before a sleep")
        figure("generate_seconds_under", tokens(program)[1])
        state = status(program.pid)
        held = tag_sum(state, "weights", "mapped")
        check(
            program.weights <= tag_sum(state, "weights", "allocated") <= program.weights * 1.02 + SLACK,
            f"the tag weights holds {gib(tag_sum(state, 'weights', 'allocated'))}, the model {gib(program.weights)}",
        )
        before = gpu_free()
        dormouse("sleep", "--tags", "weights", program.pid)
        asleep = gpu_free()
        rose = asleep - before
        figure("weights_bytes", program.weights)
        figure("free_rose_bytes", rose)
        check(
            program.weights - SLACK <= rose <= held + SLACK,
            f"free memory rose by {gib(rose)}; the weights are {gib(program.weights)}, their chunks {gib(held)}",
        )
        check(is_asleep(program.pid) >= program.weights, "status does not say that the weights are asleep")
        dormouse("status", program.pid)
        dormouse("wake", program.pid)
        check_equal(is_asleep(program.pid), 0, "bytes asleep after waking")
        figure("sleep_seconds", max(t["last_sleep"]["seconds"] for t in status(program.pid)["tags"] if t["tag"] == "weights"))
        figure("wake_seconds", max(t["last_wake"]["seconds"] for t in status(program.pid)["tags"] if t["tag"] == "weights"))
        check(abs(gpu_free() - before) <= SLACK, f"free memory is {gib(gpu_free())} after waking and was {gib(before)}")
        check_equal(tokens(program)[0], expected, "tokens after a sleep and a wake")
        for round_ in range(3):
            dormouse("sleep", program.pid)  # all tags: the cache is discarded, the program resets it anyway
            dormouse("wake", program.pid)
            check_equal(tokens(program)[0], expected, f"tokens after round {round_ + 2}")


@case
def a_request_during_a_sleep_waits_and_is_answered_after_the_wake():
    needs()
    expected = tokens_without_library()
    with server() as program:
        check_equal(tokens(program)[0], expected, "tokens before")
        dormouse("sleep", "--tags", "weights", program.pid)
        program.send("generate")
        wait_until(lambda: status(program.pid)["gate"]["waiting_threads"] > 0, "a thread waits at the gate")
        check(program.next_line("tokens", 2.0) is None, "the program answered while its weights were asleep")
        check(is_asleep(program.pid) > 0, "the waiting request woke the memory, against DORMOUSE_GATE=wait")
        dormouse("wake", program.pid)
        check_equal(program.expect("tokens").split()[0], expected, "tokens of the request that waited")


@case
def a_request_wakes_the_memory_where_the_gate_is_told_so():
    needs()
    with start(DORMOUSE_GATE="wake") as program:
        expected = tokens(program)[0]
        dormouse("sleep", "--tags", "weights", program.pid)
        check_equal(tokens(program)[0], expected, "tokens of the request that woke the memory")
        check_equal(is_asleep(program.pid), 0, "bytes asleep after the request")


@case
def a_sleep_in_the_middle_of_a_request_changes_nothing():
    needs()
    expected = tokens_without_library()
    with server() as program:
        tokens(program)
        for _ in range(3):
            program.send("generate")
            check(program.next_line("tokens", 0.2) is None, "the request was over before the sleep; use more layers")
            dormouse("sleep", "--tags", "weights", program.pid)
            dormouse("wake", program.pid)
            check_equal(program.expect("tokens").split()[0], expected, "tokens of a request with a sleep in its middle")


@case
def a_wake_without_memory_fails_and_can_be_tried_again():
    needs()
    expected = tokens_without_library()
    with server() as program:
        check_equal(tokens(program)[0], expected, "tokens before")
        dormouse("sleep", "--tags", "weights", program.pid)
        asleep = is_asleep(program.pid)
        leave = program.weights // 2
        tenant = Program([sys.executable, PROGRAMS / "hold_memory.py", leave], environment(preload=False), "hold_memory.py")
        with tenant:
            held = int(tenant.expect("held", 60))
            check(held > 0, "the other tenant got no memory")
            said = dormouse("wake", program.pid, expect_failure=True)
            check("memory" in said, f"the error does not speak of memory: {said}")
            check_equal(is_asleep(program.pid), asleep, "bytes asleep after a wake that failed")
            tenant.send("")
        wait_until(lambda: gpu_free() > asleep + GIB // 2, "the other tenant's memory is free again")
        dormouse("wake", program.pid)
        check_equal(tokens(program)[0], expected, "tokens after the second wake")


@case
def the_program_exits_cleanly_while_asleep():
    global _shared
    needs()
    with server() as program:
        tokens(program)
        held = program.weights
        before = gpu_free()
        dormouse("sleep", program.pid)
        check_equal(program.finish(), 0, "exit status")
    _shared = None
    wait_until(lambda: gpu_free() >= before + held - SLACK, "all GPU memory is free after the exit")


def start_plain(preload=True):
    env = environment("@transformers", preload=preload, PYTORCH_CUDA_ALLOC_CONF=ALLOC_CONF)
    command = [sys.executable, PROGRAMS / "generate_plain.py", "--layers", harness.settings["plain_layers"]]
    program = Program(command, env, "generate_plain.py")
    program.weights = int(program.expect("ready", 240))
    return program


@case
def a_program_that_marks_nothing_sleeps_and_wakes_by_the_preset_alone():
    needs()
    with start_plain(preload=False) as program:
        expected = tokens(program)[0]
        check_equal(tokens(program)[0], expected, "tokens of a second request, without the library")
    with start_plain() as program:
        check_equal(tokens(program)[0], expected, "tokens under the library, before a sleep")
        state = status(program.pid)
        check(tag_sum(state, "weights", "allocated") >= program.weights, f"the weights have no tag: {state['tags']}")
        check(tag_sum(state, "kv_cache", "allocations") > 0, f"the cache has no tag: {state['tags']}")
        before = gpu_free()
        dormouse("sleep", program.pid)
        check(gpu_free() - before >= program.weights - SLACK, "the weights are still on the GPU")
        dormouse("wake", program.pid)
        check_equal(tokens(program)[0], expected, "tokens after a sleep of everything")
        for _ in range(3):
            program.send("generate")
            check(program.next_line("tokens", 0.2) is None, "the request was over before the sleep; use more layers")
            dormouse("sleep", program.pid)
            check(is_asleep(program.pid) >= program.weights, "status does not say that the weights are asleep")
            dormouse("wake", program.pid)
            check_equal(program.expect("tokens").split()[0], expected, "tokens of a request with a sleep in its middle")
        check("does not fit" not in program.errors(), f"the preset does not fit this transformers: {program.errors()}")


if __name__ == "__main__":
    sys.exit(harness.main("serve", layers=24, plain_layers=8))
