"""Threads that allocate inside regions and outside at the same time; prints one JSON object with what it saw.

Runs under the library, with expandable segments on. Meanwhile the main thread changes the other settings. It is watched
in one of two ways, since a snapshot carries the whole history:

history     Each thread has a CUDA stream for what it allocates inside regions and another for the rest, so that every
            segment of the whole run can be told apart by its stream in the allocator's own history: `segment_alloc` is
            a plain segment, `segment_map` is part of an expandable one.
snapshots   Each thread looks up its live tensors and the settings in force again and again.
"""
import argparse
import collections
import contextlib
import ctypes
import json
import random
import threading
import time

import torch

MIB = 1 << 20
SIZES = [512, 64 << 10, 900 << 10, 3 * MIB, 11 * MIB, 21 * MIB, 40 * MIB]
KEPT = 6  # tensors that a thread holds on each side
THRESHOLDS = [0.5, 0.625, 0.75, 0.875]  # values of garbage_collection_threshold that the main thread sets in turn

library = ctypes.CDLL(None)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--watch", choices=["history", "snapshots"], default="history")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


@contextlib.contextmanager
def api_region():
    if library.dormouse_region_begin(b"weights") != 0:
        raise RuntimeError("dormouse_region_begin failed")
    try:
        yield
    finally:
        if library.dormouse_region_end() != 0:
            raise RuntimeError("dormouse_region_end failed")


def nvtx_region():
    return torch.cuda.nvtx.range("load_weights")


class Settings:
    """The settings that were asked for, with the exact window in which a reader may see each."""

    def __init__(self):
        self.values = [THRESHOLDS[0]]
        self.started = 0
        self.finished = 0

    def text(self, threshold, expandable=True):
        # A small max_split_size_mb would make PyTorch keep every large free block of an expandable segment.
        return f"expandable_segments:{expandable},max_split_size_mb:4096,garbage_collection_threshold:{threshold}"

    def set(self, threshold):
        self.values.append(threshold)
        self.started += 1
        torch._C._accelerator_setAllocatorSettings(self.text(threshold))
        self.finished += 1

    def read(self):
        """The other settings, as the allocator shows them to this thread, and which are right."""
        first = self.finished
        shown = allocator_settings()
        allowed = self.values[first : self.started + 1]
        return (shown["max_split_size"], shown["garbage_collection_threshold"]), [(4096 * MIB, v) for v in allowed]


def allocator_settings():
    return torch.cuda.memory._snapshot()["allocator_settings"]


class Worker(threading.Thread):
    def __init__(self, number, args, settings, problems):
        super().__init__(daemon=True)
        self.inside, self.outside = torch.cuda.Stream(), torch.cuda.Stream()
        self.random = random.Random(args.seed * 1000 + number)
        self.number, self.args, self.settings, self.problems = number, args, settings, problems
        self.watches = args.watch == "snapshots"
        self.kept = {True: collections.deque(maxlen=KEPT), False: collections.deque(maxlen=KEPT)}

    def problem(self, text):
        if len(self.problems) < 20:
            self.problems.append(f"thread {self.number}: {text}")

    def allocate(self, inside):
        for _ in range(self.random.randint(1, 3)):
            self.kept[inside].append(torch.empty(self.random.choice(SIZES), dtype=torch.uint8, device="cuda"))
        if self.random.random() < 0.3:
            self.kept[inside].popleft()

    def step(self):
        """Half of the threads work mostly inside regions, half mostly outside; each does some of both."""
        inside = self.random.random() < (0.9 if self.number % 2 == 0 else 0.1)
        if not inside:
            with torch.cuda.stream(self.outside):
                self.allocate(False)
            return
        region = api_region() if self.random.random() < 0.5 else nvtx_region()
        with torch.cuda.stream(self.inside), region:
            self.allocate(True)
            if self.random.random() < 0.1:  # nested, with the rest of the program in between
                library.dormouse_region_begin_none()
                with torch.cuda.stream(self.outside):
                    self.allocate(False)
                library.dormouse_region_end()
                self.allocate(True)
            if self.watches and self.random.random() < 0.02:
                self.check_settings("inside")

    def check_settings(self, where):
        shown, allowed = self.settings.read()
        if shown not in allowed:
            self.problem(f"{where}: max_split_size and garbage_collection_threshold are {shown}, asked for was {allowed}")

    def check_segments(self):
        """What is alive now, by address."""
        segments = torch.cuda.memory_snapshot()
        for inside, tensors in self.kept.items():
            for tensor in tensors:
                found = [s for s in segments if s["address"] <= tensor.data_ptr() < s["address"] + s["total_size"]]
                if len(found) != 1:
                    self.problem(f"{len(found)} segments hold {tensor.data_ptr():#x}")
                elif found[0]["is_expandable"] == inside:
                    where = "inside a region" if inside else "outside"
                    kind = "expandable" if inside else "plain"
                    self.problem(f"{tensor.numel()} bytes allocated {where} lie in a segment that is {kind}")

    def run(self):
        try:
            for round_ in range(self.args.rounds):
                self.step()
                if self.watches and round_ % 50 == self.number:
                    self.check_settings("outside")
                if self.watches and round_ % 500 == 10 * self.number:
                    self.check_segments()
                if round_ % 100 == 10 * self.number:  # so that segments are made all the time
                    torch.cuda.empty_cache()
            if self.watches:
                self.check_segments()
        except Exception as error:  # noqa: BLE001
            self.problem(f"{type(error).__name__}: {error}")


def count_history(workers):
    """Segment events by side and kind over the whole run."""
    inside = {worker.inside.cuda_stream for worker in workers}
    outside = {worker.outside.cuda_stream for worker in workers}
    counts = collections.Counter()
    for trace in torch.cuda.memory._snapshot()["device_traces"]:
        for entry in trace:
            if not entry["action"].startswith("segment_"):
                continue
            side = "inside" if entry["stream"] in inside else "outside" if entry["stream"] in outside else "other"
            counts[f"{side} {entry['action']}"] += 1
    return dict(counts)


def last_word(settings, problems):
    """What the program asks for holds, on and off; inside a region it is off either way."""
    for expandable in (False, True):
        torch._C._accelerator_setAllocatorSettings(settings.text(THRESHOLDS[0], expandable))
        torch.cuda.empty_cache()
        outside = torch.empty(60 * MIB, dtype=torch.uint8, device="cuda")
        with api_region():
            inside = torch.empty(60 * MIB, dtype=torch.uint8, device="cuda")
        for tensor, wanted in ((outside, expandable), (inside, False)):
            segment = next(
                s for s in torch.cuda.memory_snapshot()
                if s["address"] <= tensor.data_ptr() < s["address"] + s["total_size"]
            )
            if segment["is_expandable"] != wanted:
                problems.append(f"asked for {expandable}: a segment is expandable={segment['is_expandable']}")
        if allocator_settings()["expandable_segments"] != expandable:
            problems.append(f"asked for {expandable}: the settings show the contrary")
        del outside, inside


def main():
    args = arguments()
    problems = []
    torch.cuda.init()
    torch.empty(1, device="cuda")
    if args.watch == "history":
        torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=20_000_000)
    settings = Settings()
    torch._C._accelerator_setAllocatorSettings(settings.text(THRESHOLDS[0]))
    workers = [Worker(number, args, settings, problems) for number in range(args.threads)]
    begin = time.monotonic()
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        settings.set(THRESHOLDS[len(settings.values) % len(THRESHOLDS)])
        time.sleep(0.05)
    for worker in workers:
        worker.join()
    seconds = time.monotonic() - begin
    torch.cuda.synchronize()
    history = count_history(workers) if args.watch == "history" else {}
    torch.cuda.memory._record_memory_history(enabled=None)
    for worker in workers:
        worker.kept.clear()
    last_word(settings, problems)
    print(json.dumps({"problems": problems, "history": history, "seconds": round(seconds, 2),
                      "changes": settings.finished}), flush=True)


if __name__ == "__main__":
    main()
