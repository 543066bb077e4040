"""What scripts/demo shows: a program that knows nothing of Dormouse, put to sleep and woken from outside, step by step.

Ends with 0 if the program's results were the same all along.
"""
import argparse
import contextlib
import os
import sys

import harness
from harness import GIB, PROGRAMS, Program, built, environment

REGIONS = "weights: nvtx(load_weights), nvtx(weights)"


def amount(count):
    return f"{count / GIB:6.2f} GiB" if count >= GIB // 4 else f"{count / harness.MIB:6.1f} MiB"


class Model:
    """A language model of PyTorch on the GPU; programs/generate.py."""

    title = "a transformers model with random weights on PyTorch, expandable segments on"
    result = "tokens"

    def __init__(self):
        self.where = harness.gpu_name()
        self.argv = [sys.executable, PROGRAMS / "generate.py"]
        self.variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

    def work(self, program):
        return program.ask("generate", "tokens").split()[0]

    def free(self, _program):
        return harness.gpu_free()


class SimulatedServer:
    """A small server on the simulated driver; tests/programs/serve.cc. Every step has another result."""

    title = "a small CUDA server, its weights loaded in an NVTX range"
    result = "checksum"

    def __init__(self):
        self.where = "simulated GPU (no GPU with PyTorch and transformers was found)"
        self.argv = [built("serve"), "512", "32"]
        self.variables = {"LD_LIBRARY_PATH": harness.BUILD / "sim", "SIMGPU_MEMORY": "2GiB"}

    def work(self, program):
        return program.ask("step", "step").split()[-1]

    def free(self, program):
        return int(program.ask("info", "free").split()[0])


def choose(simulated):
    if not simulated:
        with contextlib.suppress(harness.Skip):
            harness.needs_torch()
            harness.needs_module("transformers")
            return Model()
    return SimulatedServer()


def line(moment, target, program, note=""):
    state = harness.status(program.pid)
    asleep, held = harness.tag_sum(state, "weights", "asleep"), harness.tag_sum(state, "weights", "mapped")
    print(f"  {moment:22} weights on the GPU {amount(held)}   asleep {amount(asleep)}   free on the GPU "
          f"{amount(target.free(program))}   {note}".rstrip(), flush=True)
    return state


def last(state, operation):
    """Seconds and GB/s of the last sleep or wake of the weights."""
    figures = [tag[operation] for tag in state["tags"] if tag["tag"] == "weights"]
    seconds = max(entry["seconds"] for entry in figures)
    return f"{seconds * 1e3:.0f} ms, {sum(entry['bytes'] for entry in figures) / 1e9 / max(seconds, 1e-9):.1f} GB/s"


def results_alone(target, count):
    with Program(target.argv, environment(preload=False, **target.variables), "the program alone") as program:
        program.expect("ready", 300)
        return [target.work(program) for _ in range(count)]


def show(target):
    print(f"\nThe program: {target.title}\nThe GPU:     {target.where}\n")
    expected = results_alone(target, 3)
    print(f"Without Dormouse its {target.result}s are {', '.join(expected)}\n")
    env = environment(REGIONS, **target.variables)
    command = " ".join(os.path.basename(str(part)) for part in target.argv)
    print(f"$ LD_PRELOAD=libdormouse.so DORMOUSE_REGIONS='{REGIONS}' {command} &")
    found = []
    with Program(target.argv, env, "the program") as program:
        program.expect("ready", 300)
        found.append(target.work(program))
        line("awake", target, program)
        for _ in range(2):
            print(f"$ dormouse sleep --tags weights {program.pid}")
            run_quietly("sleep", "--tags", "weights", program.pid)
            state = line("asleep", target, program)
            slept = last(state, "last_sleep")
            print(f"$ dormouse wake {program.pid}")
            run_quietly("wake", program.pid)
            found.append(target.work(program))
            state = line("awake again", target, program)
            print(f"  slept in {slept}; woke in {last(state, 'last_wake')}")
    same = found == expected
    print(f"\nWith Dormouse its {target.result}s are {', '.join(found)}: " + ("the same" if same else "NOT THE SAME"))
    return 0 if same else 1


def run_quietly(*arguments):
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        harness.dormouse(*arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sim", action="store_true", help="the simulated driver in any case")
    arguments = parser.parse_args()
    try:
        return show(choose(arguments.sim))
    except (AssertionError, harness.Skip) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
