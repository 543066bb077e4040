"""vLLM's own allocator module (vllm/device_allocator, and its compiled extension) without the rest of vLLM: its sleep and
wake as they are, kept by the preset @vllm with expandable segments on, and replaced by @vllm:replace.

Three generations of it: 0.10.2 refuses expandable segments, 0.24.0 switches them off for the process by a text that drops
the user's other settings, 0.33.0 rewrites the whole text. The files are in out/gpu where scripts/gpu pack found them.
"""
import sys

import harness
from harness import (
    MIB, PROGRAMS, Program, Skip, case, check, check_equal, dormouse, environment, figure, gib, status, tag_sum,
)

REFUSES, SWITCHES, REWRITES = "0.10.2", "0.24.0", "0.33.0"
OTHERS = "max_split_size_mb:256,garbage_collection_threshold:0.8,roundup_power2_divisions:8"
CONF = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True," + OTHERS}
CONF_OFF = {"PYTORCH_CUDA_ALLOC_CONF": OTHERS}

# What the module imports of the rest of vLLM.
REST = {
    "envs.py": "VLLM_CUDART_SO_PATH = None\n",
    "logger.py": "import logging\n\ninit_logger = logging.getLogger\n",
    "platforms/__init__.py": """
class current_platform:
    is_cuda_alike = staticmethod(lambda: True)
    is_rocm = is_xpu = staticmethod(lambda: False)
""",
    "distributed/__init__.py": "",
    "distributed/device_communicators/__init__.py": "",
    "utils/__init__.py": "def is_pin_memory_available():\n    return True\n",
    "utils/torch_utils.py": "PIN_MEMORY = True\n",
    "utils/system_utils.py": """
def find_loaded_library(name):
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line[line.find("/"):].strip() if "/" in line else ""
            if path.rpartition("/")[2].startswith((name + ".", name + "-")):
                return path
""",
}


class Worker:
    """A process with the allocator, loaded or not."""

    def __init__(self, version, preset, conf, load=True):
        harness.needs_torch_or_simulation()
        path = harness.package_path("vllm", version, {"__init__.py": f"__version__ = {version!r}\n", **REST})
        env = environment(regions=preset, preload=preset is not None, PYTHONPATH=path, **conf)
        self._program = Program([sys.executable, PROGRAMS / "vllm_allocator.py"], env, f"vllm_allocator.py {version}")
        self._load = f"load {harness.settings['gib']} {harness.settings['cache_gib']}" if load else None
        self.pid = self._program.pid

    def __enter__(self):
        self._program.__enter__()
        try:
            self.started = self._program.answer()
            if "cannot" in self.started:
                raise Skip(f"the extension does not load into this PyTorch: {self.started['cannot']}")
            if self._load is not None:
                self.loaded = self.ask(self._load)
        except BaseException:
            self._program.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, *error):
        if kind is None:
            check_equal(self._program.finish(), 0, f"exit status; it wrote:\n{self.said()}")
        self._program.__exit__(kind, *error)

    def ask(self, command):
        return self._program.command(command)

    def said(self):
        return self._program.errors()

    def bytes(self):
        return sum(self.loaded["bytes"].values())


# --- What is asked of every way.


def check_content(worker, **expected):
    check_equal({tag: worker.ask(f"check {tag}")["content"] for tag in expected}, expected, "content")
    check(worker.ask("state")["addresses_same"], "addresses changed")


def check_sleeps_and_wakes(worker, name):
    """Two rounds of vLLM's level 1: weights kept, the cache discarded."""
    times = {"sleep": [], "wake": []}
    usage = worker.ask("state")["usage"]
    # A pool may have more than the tensors, by the rounding of its segments.
    check(worker.bytes() <= usage <= worker.bytes() * 1.3 + 64 * MIB, f"usage of {gib(usage)} for {gib(worker.bytes())}")
    for _ in range(2):
        asleep = worker.ask("sleep weights")
        check(asleep["freed"] >= worker.bytes() - 32 * MIB, f"freed {gib(asleep['freed'])} of {gib(worker.bytes())}")
        check(worker.ask("state")["usage"] in range(worker.bytes(), usage + 1), "usage changed by a sleep")
        awake = worker.ask("wake")
        check(-awake["freed"] >= worker.bytes() - 32 * MIB, f"taken again: {gib(-awake['freed'])}")
        check_content(worker, weights="same")
        worker.ask("write")
        check_content(worker, kv_cache="same")
        times["sleep"].append(round(asleep["seconds"], 4))
        times["wake"].append(round(awake["seconds"], 4))
    for what, seconds in times.items():
        figure(f"{name}_{what}_seconds", seconds)
    figure(f"{name}_freed", asleep["freed"])
    figure(f"{name}_bytes", worker.bytes())
    figure(f"{name}_load_seconds", round(worker.loaded["seconds"], 3))


def check_segments(worker):
    """Plain inside, expandable outside: before, after, and on another thread meanwhile."""
    state = worker.ask("state")
    check_equal(state["inside_expandable"], {"weights": 0, "kv_cache": 0}, "expandable segments inside")
    check_equal(set(state["outside_expandable"].values()), {True}, f"segments outside: {state['outside_expandable']}")


def check_settings(worker):
    """All as the user set them, but for expandable_segments inside and what the preset sets for weights."""
    state = worker.ask("state")
    before = state["settings"]["before"]
    check_equal(before["max_split_size"], 256 * MIB, "max_split_size before")
    check_equal(before["expandable_segments"], True, "expandable_segments before")
    for when in ("after", "now"):
        check_equal(state["settings"].get(when, state["now"]), before, f"settings {when}")
    inside = {**before, "expandable_segments": False}
    check_equal(state["settings"]["kv_cache"], inside, "settings inside kv_cache")
    check_equal(state["settings"]["weights"], {**inside, "max_split_size": 20 * MIB}, "settings inside weights")


def check_silent(worker):
    """The library has nothing to say of presets and PyTorch where they work."""
    lines = [line for line in worker.said().splitlines() if "DORMOUSE_REGIONS" in line or "DORMOUSE_TORCH" in line]
    check(not lines, f"the library wrote {lines}")


def check_preset(version, preset, name):
    with Worker(version, preset, CONF) as worker:
        check_settings(worker)
        check_segments(worker)
        check_sleeps_and_wakes(worker, name)
        check_settings(worker)
        check_segments(worker)
        check_silent(worker)


# --- Its own way, for comparison.


@case
def an_early_version_refuses_expandable_segments():
    with Worker(REFUSES, None, CONF, load=False) as worker:
        check("xpandable segments" in worker.started.get("refused", ""), f"it said {worker.started}")


@case
def an_early_version_sleeps_without_them():
    with Worker(REFUSES, None, CONF_OFF) as worker:
        check_sleeps_and_wakes(worker, "own_early")


@case
def a_switching_version_loses_the_users_other_settings():
    with Worker(SWITCHES, None, CONF) as worker:
        before, after = (worker.ask("state")["settings"][when] for when in ("before", "after"))
        lost = sorted(key for key in before if before[key] != after[key])
        figure("lost_by_its_own_switch", lost)
        check("max_split_size" in lost, f"nothing was lost: {after}")
        check_sleeps_and_wakes(worker, "own_switching")


@case
def a_rewriting_version_switches_them_for_every_thread():
    with Worker(REWRITES, None, CONF) as worker:
        state = worker.ask("state")
        check_equal(state["settings"]["after"], state["settings"]["before"], "settings afterwards")
        check_equal(state["outside_expandable"]["weights"], False, "another thread's memory is expandable meanwhile")
        check_sleeps_and_wakes(worker, "own_late")


# --- With the presets.


@case
def kept_an_early_version_sleeps_with_expandable_segments_on():
    check_preset(REFUSES, "@vllm", "kept_early")


@case
def kept_a_switching_version_keeps_the_users_settings():
    check_preset(SWITCHES, "@vllm", "kept_switching")


@case
def kept_a_rewriting_version_leaves_other_threads_alone():
    check_preset(REWRITES, "@vllm", "kept_late")


@case
def replaced_an_early_version_sleeps_by_our_engine():
    check_preset(REFUSES, "@vllm:replace", "replaced_early")


@case
def replaced_a_switching_version_sleeps_by_our_engine():
    check_preset(SWITCHES, "@vllm:replace", "replaced_switching")


@case
def replaced_a_late_version_sleeps_from_outside_too():
    with Worker(REWRITES, "@vllm:replace", CONF) as worker:
        check_settings(worker)
        check_segments(worker)
        check_sleeps_and_wakes(worker, "replaced_late")
        check_table(worker)
        check_command(worker)
        check_discard(worker)
        check_silent(worker)


def check_table(worker):
    """The allocator's table tells what is mapped, and a tag that is entered again gives back what was freed."""
    check_equal(worker.ask("reenter"), {"mapped": [2, 1, 0, 1], "same": True}, "a tag that is entered again")


def check_command(worker):
    """`dormouse` sees the tags, and what sleeps by it wakes by vLLM's wake_up."""
    state = status(worker.pid)
    for tag, size in worker.loaded["bytes"].items():
        allocated = tag_sum(state, tag, "allocated")
        check(size <= allocated <= size * 1.3 + 64 * MIB, f"{tag} has {gib(allocated)} for {gib(size)}")
    told = dormouse("status", worker.pid)
    check("weights" in told and "kv_cache" in told, f"dormouse status says: {told}")
    dormouse("sleep", "--tags", "weights", worker.pid)
    dormouse("wake", worker.pid)
    check_content(worker, weights="same")
    dormouse("sleep", worker.pid)
    asleep = tag_sum(status(worker.pid), "weights", "asleep")
    check(asleep >= worker.loaded["bytes"]["weights"], f"asleep: {gib(asleep)}")
    worker.ask("wake")
    check_content(worker, weights="same", kv_cache="same")


def check_discard(worker):
    """discard(tag) frees that tag at once; the content is gone, and reads as zero here."""
    size = worker.loaded["bytes"]
    gone = worker.ask("discard kv_cache")
    check(size["kv_cache"] - 32 * MIB <= gone["freed"] < size["kv_cache"] + 0.5 * size["weights"], f"freed {gone}")
    check(worker.ask("wake kv_cache")["freed"] <= 32 * MIB - size["kv_cache"], "wake_up took no memory")
    check_content(worker, weights="same", kv_cache="zero")


if __name__ == "__main__":
    sys.exit(harness.main("vllm", gib=4.0, cache_gib=1.0))
