"""The cases of tests/torch/test_cuda.py, which CI runs on the simulated driver, on the GPU and the PyTorch of this Python.

Each is a process of its own; several run at once, but for those that look at the whole GPU's memory.
"""
import concurrent.futures
import os
import subprocess
import sys

import harness
from harness import Skip, case, check, environment

sys.path.insert(0, str(harness.REPOSITORY / "tests" / "torch"))
import test_cuda  # noqa: E402  tests/torch/test_cuda.py

AT_ONCE = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
# What these measure or need is the whole GPU's.
ALONE = {
    "out_of_memory_in_a_region_is_pytorchs_error",
    "memory_cached_outside_is_there_for_a_region",
    "content_survives_a_sleep_and_expandable_memory_stays_awake",
}

_running = {}  # by name


def run(function):
    env = environment(**{**test_cuda.EXPANDABLE, **test_cuda.CASES[function]})
    command = [sys.executable, test_cuda.__file__, function.__name__]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100)


def start_all():
    """All that may run at once, or those that the command line names."""
    named = [name for name in sys.argv[1:] if name in {function.__name__ for function in test_cuda.CASES}]
    pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
    for function in test_cuda.CASES:
        name = function.__name__
        if name not in ALONE and (not named or name in named):
            _running[name] = pool.submit(run, function)
    pool.shutdown(wait=False)


def result_of(function):
    harness.needs_torch()
    if not _running:
        start_all()
    if function.__name__ not in ALONE:
        return _running[function.__name__].result()
    concurrent.futures.wait(_running.values())
    return run(function)


def add(function):
    def on_the_gpu():
        done = result_of(function)
        if done.returncode == 77:
            raise Skip(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "it says nothing")
        check(done.returncode == 0, f"it ended with {done.returncode}:\n{done.stdout[-3000:]}")
        check(test_cuda.says_what_it_should(done.stdout), f"the library is to say, or not:\n{done.stdout[-3000:]}")

    on_the_gpu.__name__ = function.__name__
    case(on_the_gpu)


# Those that run alone come last.
for each in sorted(test_cuda.CASES, key=lambda function: function.__name__ in ALONE):
    add(each)


if __name__ == "__main__":
    sys.exit(harness.main("torch"))
