"""Uses torch_memory_saver through its own Python package as its users do; prints one JSON object.

Which library stands behind the package depends on LD_PRELOAD alone. `--gib` is the size of each of two tags.
"""
import argparse
import json
import time

import torch
from torch_memory_saver import torch_memory_saver

GIB = 1 << 30


def free_memory():
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def timed(work):
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def fill(tensor, seed):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    tensor.random_(generator=generator)


def same(tensor, seed):
    expected = torch.empty_like(tensor)
    fill(expected, seed)
    result = torch.equal(tensor, expected)
    del expected
    torch.cuda.empty_cache()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    count = int(args.gib * GIB / 8)
    pieces = 4
    saver = torch_memory_saver

    outside = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
    with saver.region(tag="weights", enable_cpu_backup=True):
        weights = [torch.empty(count // pieces, dtype=torch.int64, device="cuda") for _ in range(pieces)]
    with saver.region(tag="kv_cache"):
        cache = torch.empty(count, dtype=torch.int64, device="cuda")
    for number, tensor in enumerate(weights):
        fill(tensor, number)
    cache.fill_(7)
    outside.fill_(9)
    addresses = [tensor.data_ptr() for tensor in [*weights, cache]]

    seen = {"bytes": count * 8, "pause_seconds": [], "resume_seconds": [], "freed": [], "same": [], "backup_same": []}
    for _ in range(args.rounds):
        before = free_memory()
        seen["pause_seconds"].append(timed(lambda: saver.pause("weights")))
        seen["freed"].append(free_memory() - before)
        backup = saver.get_cpu_backup(weights[1])
        saver.pause("kv_cache")
        seen["freed_both"] = free_memory() - before
        saver.resume("kv_cache")
        seen["resume_seconds"].append(timed(lambda: saver.resume("weights")))
        seen["same"].append(all(same(tensor, number) for number, tensor in enumerate(weights)))
        seen["backup_same"].append(backup is not None and torch.equal(backup, weights[1].cpu()))
    saver.pause()
    saver.resume()
    seen["same"].append(all(same(tensor, number) for number, tensor in enumerate(weights)))
    seen["outside_same"] = bool((outside == 9).all())
    seen["addresses_same"] = addresses == [tensor.data_ptr() for tensor in [*weights, cache]]
    cache.fill_(5)
    seen["cache_usable"] = bool((cache == 5).all())
    segments = torch.cuda.memory_snapshot()
    seen["inside_expandable"] = sum(
        s["is_expandable"] for s in segments for a in addresses if s["address"] <= a < s["address"] + s["total_size"]
    )
    seen["outside_expandable"] = any(
        s["is_expandable"] for s in segments if s["address"] <= outside.data_ptr() < s["address"] + s["total_size"]
    )
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
