"""SGLang's own adapter of torch_memory_saver and that package's own Python code, without the rest of SGLang, under the preset
@sglang: with expandable segments on, which the package refuses by itself.

Two generations of the adapter: that of 0.5.2 knows no backup, so that what it pauses loses its content; that of 0.5.23 does. The
files are in out/gpu where scripts/gpu pack found them.
"""
import os
import sys

import harness
from harness import (
    MIB, PROGRAMS, Program, Skip, built, case, check, check_equal, dormouse, environment, figure, gib, status, tag_sum,
)

WITHOUT_BACKUP, WITH_BACKUP = "0.5.2", "0.5.23"
OTHERS = "max_split_size_mb:256,garbage_collection_threshold:0.8,roundup_power2_divisions:8"
CONF = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True," + OTHERS}

# What the adapter imports of the rest of SGLang.
REST = {
    "__init__.py": "",
    "srt/__init__.py": "",
    "srt/utils/__init__.py": "",
    "srt/utils/common.py": "def is_xpu():\n    return False\n",
}


class Engine:
    """A process with the adapter, and the worker that it starts."""

    def __init__(self, version, preload=True):
        harness.needs_torch_or_simulation()
        harness.needs_module("torch_memory_saver")
        path = harness.package_path("sglang", version, REST)
        env = environment(regions="@sglang", preload=preload, PYTHONPATH=path, **CONF)
        self._program = Program([sys.executable, PROGRAMS / "sglang_adapter.py"], env, f"sglang_adapter.py {version}")

    def __enter__(self):
        self._program.__enter__()
        try:
            self.started = self._program.answer()
        except BaseException:
            self._program.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, *error):
        if kind is None and "refused" not in self.started:
            self.ask("quit")
            check_equal(self._program.finish(), 0, f"exit status; it wrote:\n{self.said()}")
        self._program.__exit__(kind, *error)

    def ask(self, command):
        return self._program.command(command)

    def load(self):
        check("refused" not in self.started, f"the worker did not start: {self.started.get('refused')}")
        settings = harness.settings
        self.bytes = self.ask(f"load {settings['gib']} {settings['cache_gib']}")["bytes"]

    def said(self):
        return self._program.errors()


def check_exact(engine):
    """Suspended in the regions and nowhere else, nothing lost."""
    state = engine.ask("state")
    check(state["enabled"], "the adapter is not enabled")
    check(state["addresses_same"], "addresses changed")
    check_equal(state["inside_expandable"], {"weights": 0, "kv_cache": 0}, "expandable segments in regions")
    check_equal(state["outside_expandable"], dict.fromkeys(state["outside_expandable"], True), "expandable segments outside")
    for when, now in state["settings"].items():
        check_equal(now | {"expandable_segments": True}, state["settings"]["before"], f"settings in force, {when}")
        check_equal(now["expandable_segments"], when in ("before", "after"), f"expandable_segments, {when}")


def check_pauses(engine, weights, name):
    """Twice; `weights` is what becomes of their content."""
    pauses, resumes = [], []
    for _ in range(2):
        pause = engine.ask("pause weights")
        cache = engine.ask("pause kv_cache")
        for tag, answer in (("weights", pause), ("kv_cache", cache)):
            # The first pause loads the kernels that hash and copy.
            check(answer["freed"] >= engine.bytes[tag] - 8 * MIB, f"pausing {tag} freed {gib(answer['freed'])}")
        pauses.append(round(pause["seconds"], 4))
        resumes.append(round(engine.ask("resume weights")["seconds"], 4))
        engine.ask("resume kv_cache")
        check_equal(engine.ask("check weights")["content"], weights, "weights after the resume")
        for tag in ("weights", "kv_cache"):
            engine.ask(f"write {tag}")
            check_equal(engine.ask(f"check {tag}")["content"], "same", f"{tag} written again")
    figure(f"{name}_pause_seconds", pauses)
    figure(f"{name}_resume_seconds", resumes)
    figure(f"{name}_bytes", sum(engine.bytes.values()))


def check_silent(engine):
    check("the preset" not in engine.said(), f"the preset does not fit: {engine.said()}")


@case
def an_adapter_with_backup_pauses_with_expandable_segments_on():
    with Engine(WITH_BACKUP) as engine:
        engine.load()
        check_exact(engine)
        check_pauses(engine, "same", "with_backup")
        check_exact(engine)
        check_silent(engine)


@case
def an_adapter_without_backup_pauses_with_expandable_segments_on():
    with Engine(WITHOUT_BACKUP) as engine:
        engine.load()
        check_exact(engine)
        check_pauses(engine, "other", "without_backup")
        check_exact(engine)
        check_silent(engine)


@case
def its_worker_sleeps_from_outside_too():
    built("dormouse")
    with Engine(WITH_BACKUP) as engine:
        engine.load()
        pid = engine.started["pid"]
        dormouse("sleep", "--tags", "weights", pid)
        check(tag_sum(status(pid), "weights", "asleep") >= engine.bytes["weights"], "the weights are not asleep")
        dormouse("wake", pid)
        check_equal(engine.ask("check weights")["content"], "same", "weights after the wake")


@case
def by_itself_the_package_refuses_expandable_segments():
    if "SIMGPU_MEMORY" in os.environ:
        raise Skip("its own library needs a GPU")
    with Engine(WITH_BACKUP, preload=False) as engine:
        check("expandable_segments is not supported" in engine.started.get("refused", ""), f"it started: {engine.started}")


if __name__ == "__main__":
    sys.exit(harness.main("sglang", gib=1.0, cache_gib=0.5))
