"""What PyTorch's settings show inside and outside regions, and where memory goes; prints one JSON object.

Runs under the library. A second thread allocates outside all the time.
"""
import ctypes
import json
import threading
import time

import torch

MIB = 1 << 20
library = ctypes.CDLL(None)


def settings():
    return {name: value for name, value in torch.cuda.memory._snapshot()["allocator_settings"].items()
            if not name.endswith("ALLOC_CONF")}


def expandable(tensor):
    return next(s["is_expandable"] for s in torch.cuda.memory_snapshot()
                if s["address"] <= tensor.data_ptr() < s["address"] + s["total_size"])


def allocate(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")


def outside_thread(stop, kept):
    while not stop.is_set():
        kept.append(allocate(23))
        if len(kept) > 40:
            del kept[:20]
        time.sleep(0.002)


def timed(work, count):
    times = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - begin)
    return sorted(times)[count // 2]


def begin_and_end():
    library.dormouse_region_begin(b"weights")
    library.dormouse_region_end()


def main():
    seen = {}
    torch.cuda.init()
    before = [allocate(30)]
    outside = settings()
    stop, kept = threading.Event(), []
    thread = threading.Thread(target=outside_thread, args=(stop, kept), daemon=True)
    thread.start()
    inside_tensors = []
    for round_ in range(50):
        with torch.cuda.nvtx.range("load_weights"):
            inside_tensors.append(allocate(21 + round_ % 5))
            inside = settings()
            time.sleep(0.003)
    stop.set()
    thread.join()
    after = settings()
    seen["outside"], seen["inside"], seen["after"] = outside, inside, after
    seen["inside_expandable"] = sum(expandable(t) for t in inside_tensors)
    seen["inside_count"] = len(inside_tensors)
    seen["outside_plain"] = sum(not expandable(t) for t in before + kept)
    seen["outside_count"] = len(before + kept)
    seen["pools_with_both"] = mixed_pools()
    seen["begin_end_ns"] = timed(begin_and_end, 2000)
    print(json.dumps(seen, default=str), flush=True)


def mixed_pools():
    """Pools whose segments are partly plain and partly expandable: there a cached block could cross."""
    kinds = {}
    for segment in torch.cuda.memory_snapshot():
        kinds.setdefault(str(segment["segment_pool_id"]), set()).add(segment["is_expandable"])
    return [pool for pool, found in kinds.items() if len(found) > 1]


if __name__ == "__main__":
    main()
