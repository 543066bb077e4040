"""Everything that PyTorch's allocator and regions can do to each other, in many rounds on many threads, checked from the
allocator's own history of the whole run; prints one JSON object with what was done and what was wrong.

Runs under the library with expandable segments on and the rules of test_segments_long.py. Each thread labels what it
allocates (the allocator keeps a thread's label with each event): the region's tag, `outside`, the program's own pool or a
graph. All of a thread's labels share one CUDA stream, so that only the library keeps their cached blocks apart. Checked
for every event of the run: a segment made inside a region is plain and one made outside is expandable; a block lies in a
segment that was made for the same tag, graph or pool. Meanwhile the main thread changes the other settings, and the
threads read them.
"""
import argparse
import bisect
import collections
import contextlib
import ctypes
import json
import random
import threading
import time

import soak_regions
import torch

MIB = 1 << 20
SIZES = [512, 64 << 10, 900 << 10, 3 * MIB, 11 * MIB, 21 * MIB, 40 * MIB]
KEPT = 6  # tensors that a thread holds on each side
THRESHOLDS = [0.5, 0.625, 0.75, 0.875]  # values of garbage_collection_threshold that the main thread sets in turn
RARE = 0.01

library = ctypes.CDLL(None)
kept_references = []


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=200, help="the threads stop then, however many rounds are done")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def settings_now():
    # A snapshot of a pool that there is not: no segments, no traces. PyTorch 2.11 drops a reference to each argument.
    arguments = (1 << 40, 1 << 40, False)
    kept_references.extend(arguments)
    return torch._C._cuda_memorySnapshot(arguments)["allocator_settings"]


# --- Labels and regions.

_label = threading.local()


@contextlib.contextmanager
def label(text):
    before = getattr(_label, "text", "")
    _label.text = text
    torch._C._cuda_setMemoryMetadata(text)
    try:
        yield
    finally:
        _label.text = before
        torch._C._cuda_setMemoryMetadata(before)


def ok(code):
    if code != 0:
        raise RuntimeError("a function of the library failed")


def begin(tag):
    ok(library.dormouse_region_begin(tag.encode()))


def end():
    ok(library.dormouse_region_end())


@contextlib.contextmanager
def api_region(tag):
    begin(tag)
    try:
        with label(tag):
            yield
    finally:
        end()


@contextlib.contextmanager
def no_region():
    library.dormouse_region_begin_none()
    try:
        with label("outside"):
            yield
    finally:
        end()


@contextlib.contextmanager
def pushed_range():
    torch.cuda.nvtx.range_push("load_weights")
    try:
        with label("weights"):
            yield
    finally:
        torch.cuda.nvtx.range_pop()


@contextlib.contextmanager
def started_range():
    number = torch.cuda.nvtx.range_start("load_weights")
    try:
        with label("weights"):
            yield
    finally:
        torch.cuda.nvtx.range_end(number)


class Shared:
    """Many readers, or one writer: a graph is captured while no other thread is at work, as programs do it."""

    def __init__(self):
        self.condition = threading.Condition()
        self.readers = 0
        self.writing = False

    @contextlib.contextmanager
    def read(self):
        with self.condition:
            self.condition.wait_for(lambda: not self.writing)
            self.readers += 1
        try:
            yield
        finally:
            with self.condition:
                self.readers -= 1
                self.condition.notify_all()

    @contextlib.contextmanager
    def write(self):
        with self.condition:
            self.condition.wait_for(lambda: not self.writing)
            self.writing = True
            self.condition.wait_for(lambda: self.readers == 0)
        try:
            yield
        finally:
            with self.condition:
                self.writing = False
                self.condition.notify_all()


# --- Threads.


class Expected(Exception):
    """Thrown through regions on purpose."""


class Worker(threading.Thread):
    def __init__(self, number, run):
        super().__init__(daemon=True)
        self.number, self.shared_run = number, run
        self.random = random.Random(run.args.seed * 1000 + number)
        self.stream, self.other_stream = torch.cuda.Stream(), torch.cuda.Stream()
        self.kept = collections.defaultdict(lambda: collections.deque(maxlen=KEPT))
        self.pool, self.rounds, self.graphs = None, 0, 0
        self.done = collections.Counter()
        self.common = [self.in_api, self.in_pushed_range, self.in_started_range, self.in_function]
        self.special = [
            self.nested, self.interleaved, self.ended_another_way, self.exception, self.generator_closed_early,
            self.context_manager, self.thread_that_ends_inside, self.on_two_streams, self.in_own_pool, self.autograd,
            self.check_settings,
        ]
        self.rare = [self.out_of_memory_inside, self.empty_cache, self.empty_cache_inside]

    def allocate(self):
        name = getattr(_label, "text", "")
        for _ in range(self.random.randint(1, 3)):
            self.kept[name].append(torch.empty(self.random.choice(SIZES), dtype=torch.uint8, device="cuda"))
        if self.random.random() < 0.3:
            self.kept[name].popleft()

    # What a round may be.

    def outside(self):
        with label("outside"):
            self.allocate()

    def in_api(self):
        with api_region(self.random.choice(["weights", "kv_cache"])):
            self.allocate()

    def in_pushed_range(self):
        with pushed_range():
            self.allocate()

    def in_started_range(self):
        with started_range():
            self.allocate()

    def in_function(self):
        soak_regions.load(self.labelled)

    def labelled(self):
        with label("weights"):
            self.allocate()

    def nested(self):
        with api_region("weights"):
            self.allocate()
            with no_region():
                self.allocate()
                with api_region("kv_cache"):
                    self.allocate()
                self.allocate()
            with pushed_range():
                self.allocate()
            self.allocate()

    def interleaved(self):
        """The second region outlives the first."""
        first = torch.cuda.nvtx.range_start("load_weights")
        with label("weights"):
            self.allocate()
        begin("kv_cache")
        with label("kv_cache"):
            self.allocate()
            torch.cuda.nvtx.range_end(first)
            self.allocate()
        end()
        self.outside()

    def ended_another_way(self):
        """What a range has begun, a call ends; the pop that follows ends nothing."""
        torch.cuda.nvtx.range_push("load_weights")
        with label("weights"):
            self.allocate()
        end()
        self.outside()
        torch.cuda.nvtx.range_pop()
        self.outside()

    def exception(self):
        with contextlib.suppress(Expected), self.random.choice([api_region("kv_cache"), pushed_range()]):
            self.allocate()
            raise Expected
        with contextlib.suppress(Expected):
            soak_regions.load(self.labelled_and_thrown)
        self.outside()

    def labelled_and_thrown(self):
        self.labelled()
        raise Expected

    def generator_closed_early(self):
        parts = soak_regions.parts(self.labelled)
        for _ in range(self.random.randint(0, 3)):
            next(parts)
            self.outside()
        if self.random.random() < 0.5:
            parts.close()
        del parts
        self.outside()

    def context_manager(self):
        with soak_regions.loading(self.labelled):
            self.labelled()
        self.outside()

    def thread_that_ends_inside(self):
        def run():
            with torch.cuda.stream(self.stream):
                begin("weights")
                begin("kv_cache")
                torch._C._cuda_setMemoryMetadata("kv_cache")
                tensor = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
                tensor.record_stream(self.other_stream)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        self.outside()

    def on_two_streams(self):
        with api_region("weights"):
            self.allocate()
            with torch.cuda.stream(self.other_stream):
                self.allocate()
            self.kept["weights"][-1].record_stream(self.stream)
        with torch.cuda.stream(self.other_stream):
            self.outside()

    def in_own_pool(self):
        name = f"pool {self.number}"
        if self.pool is None:
            self.pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(self.pool), label(name):
            self.allocate()
        with api_region("weights"):
            self.allocate()

    def autograd(self):
        """The backward pass runs on a thread of PyTorch's, which is in no region."""
        with api_region("weights"):
            weights = torch.ones(self.random.choice([1000, MIB]), device="cuda", requires_grad=True)
            loss = (weights * weights).sum()
            loss.backward()
        self.outside()

    def out_of_memory_inside(self):
        with api_region("weights"):
            try:
                torch.empty(self.shared_run.total + (1 << 30), dtype=torch.uint8, device="cuda")
                self.problem("there was more memory than there is")
            except torch.cuda.OutOfMemoryError:
                pass
            self.allocate()
        self.outside()

    def empty_cache(self):
        torch.cuda.empty_cache()

    def empty_cache_inside(self):
        with api_region("weights"):
            self.allocate()
            torch.cuda.empty_cache()
            self.allocate()

    def graph(self, inside):
        name = f"graph {self.number}-{self.graphs}"
        self.graphs += 1
        region = api_region("weights") if inside else contextlib.nullcontext()
        with self.shared_run.shared.write(), region:
            graph = torch.cuda.CUDAGraph()
            with label(name), torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                tensors = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in (64 << 10, 3 * MIB, 21 * MIB)]
                with api_region("kv_cache"), label(name):
                    tensors.append(torch.zeros(MIB, dtype=torch.uint8, device="cuda"))
            if inside:
                self.allocate()
            graph.replay()
            torch.cuda.synchronize()
            del tensors, graph

    def check_settings(self):
        run = self.shared_run
        with contextlib.ExitStack() as stack:
            inside = self.random.random() < 0.5
            if inside:
                stack.enter_context(api_region("kv_cache"))
            first = run.finished
            shown = settings_now()
            allowed = run.thresholds[first : run.started + 1]
        if shown["garbage_collection_threshold"] not in allowed or shown["max_split_size"] != 4096 * MIB:
            self.problem(f"inside={inside}: the settings are {shown}, asked for was a threshold of {allowed}")
        if shown["expandable_segments"] == inside:
            self.problem(f"inside={inside}: expandable_segments is {shown['expandable_segments']}")

    # Rounds.

    def problem(self, text):
        if len(self.shared_run.problems) < 20:
            self.shared_run.problems.append(f"thread {self.number}: {text}")

    def step(self):
        """Half of the threads work mostly inside regions, half mostly outside; each does some of everything."""
        chance = self.random.random()
        if chance < RARE / 4:
            self.graph(self.random.random() < 0.5)
            self.done["graph"] += 1
            return
        inside = self.random.random() < (0.9 if self.number % 2 == 0 else 0.1)
        if chance < RARE:
            action = self.random.choice(self.rare)
        elif chance < 0.2:
            action = self.random.choice(self.special)
        else:
            action = self.random.choice(self.common) if inside else self.outside
        with self.shared_run.shared.read():
            action()
        self.done[action.__name__] += 1

    def run(self):
        try:
            with torch.cuda.stream(self.stream):
                while self.rounds < self.shared_run.args.rounds and time.monotonic() < self.shared_run.deadline:
                    self.step()
                    self.rounds += 1
                    if library.dormouse_region_depth() != 0:
                        raise RuntimeError("still inside a region after a round")
        except Exception as error:  # noqa: BLE001
            self.problem(f"{type(error).__name__}: {error}")


class Run:
    def __init__(self, args):
        self.args = args
        self.total = torch.cuda.get_device_properties(0).total_memory
        self.deadline = time.monotonic() + args.seconds
        self.problems = []
        self.shared = Shared()
        self.thresholds, self.started, self.finished = [], 0, 0

    def set(self, threshold):
        self.thresholds.append(threshold)
        self.started = len(self.thresholds) - 1
        # A small max_split_size_mb would make PyTorch keep every large free block of an expandable segment.
        text = f"expandable_segments:True,max_split_size_mb:4096,garbage_collection_threshold:{threshold}"
        torch._C._accelerator_setAllocatorSettings(text)
        self.finished = self.started


# --- The history.


class Segments:
    """The plain segments that there are, by address, each with the label that it was made under."""

    def __init__(self):
        self.addresses, self.entries = [], {}

    def add(self, address, size, made_for):
        bisect.insort(self.addresses, address)
        self.entries[address] = (address + size, made_for)

    def remove(self, address):
        self.addresses.pop(bisect.bisect_left(self.addresses, address))
        del self.entries[address]

    def at(self, address):
        """The label of the plain segment that holds the address; None if it lies in an expandable one."""
        index = bisect.bisect_right(self.addresses, address) - 1
        if index < 0:
            return None
        end, made_for = self.entries[self.addresses[index]]
        return made_for if address < end else None


def suspended(name):
    return name in ("weights", "kv_cache")


def check_history(problems):
    counts = collections.Counter()
    segments = Segments()
    for event in (event for trace in torch.cuda.memory._snapshot()["device_traces"] for event in trace):
        action, address, name = event["action"], event.get("addr"), event["user_metadata"]
        graph = name.startswith("graph")
        side = name if suspended(name) else "graph" if graph else "outside"
        wrong = None
        if action == "segment_alloc":
            counts[f"{side} plain segments"] += 1
            segments.add(address, event["size"], name)
            wrong = None if suspended(name) or graph else "a plain segment was made"
        elif action == "segment_map":
            counts[f"{side} expandable segments"] += 1
            wrong = "an expandable segment was made" if suspended(name) else None
        elif action == "segment_free":
            segments.remove(address)
        elif action == "alloc":
            counts[f"{side} blocks"] += 1
            made_for = segments.at(address)
            if made_for != (name if suspended(name) else made_for if graph and made_for in (name, None) else None):
                wrong = f"a block came from a segment that was made for '{made_for or 'expandable'}'"
        if wrong and len(problems) < 40:
            problems.append(f"{wrong} under the label '{name}': {event['size']} bytes")
    return dict(counts)


def main():
    args = arguments()
    torch.cuda.init()
    torch.empty(1, device="cuda")
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=20_000_000)
    run = Run(args)
    run.set(THRESHOLDS[0])
    workers = [Worker(number, run) for number in range(args.threads)]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        run.set(THRESHOLDS[len(run.thresholds) % len(THRESHOLDS)])
        time.sleep(0.05)
    seconds = time.monotonic() - began
    torch.cuda.synchronize()
    history = check_history(run.problems)
    torch.cuda.memory._record_memory_history(enabled=None)
    done = sum((worker.done for worker in workers), collections.Counter())
    print(json.dumps({"problems": run.problems, "history": history, "done": dict(done), "seconds": round(seconds, 2),
                      "rounds": min(worker.rounds for worker in workers), "changes": len(run.thresholds)}), flush=True)


if __name__ == "__main__":
    main()
