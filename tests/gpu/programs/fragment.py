"""Serving with mixed sequence lengths, as far as the memory allocator sees it; prints one JSON object.

Weights and a static cache are loaded in NVTX ranges; then thousands of steps allocate and free activations whose sizes
follow the step's sequence length, while requests of unlike lifetimes keep some of theirs. First the peak is measured over
the steps, then requests are kept until memory is out under a cap. No kernel runs.
"""
import argparse
import collections
import json
import random
import time

import torch

MIB = 1 << 20
GIB = 1 << 30
HIDDEN = 8192


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--weights-gib", type=float, default=4)
    parser.add_argument("--cap-gib", type=float, default=16)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def allocate(count):
    return torch.empty(int(count), dtype=torch.bfloat16, device="cuda")


def load(gib, name):
    """Parameters of the sizes that a transformer has."""
    parameters = []
    left = int(gib * GIB)
    with torch.cuda.nvtx.range(name):
        while left > 0:
            for count in (HIDDEN * HIDDEN // 4, HIDDEN * HIDDEN // 16, HIDDEN * HIDDEN, HIDDEN):
                parameters.append(allocate(count))
                left -= 2 * count
    return parameters


def sequence_length(generator):
    """Most are short, some are long."""
    return int(min(16384, 64 * 2 ** (generator.random() ** 2 * 8) * (1 + generator.random())))


def step(generator, requests):
    length = sequence_length(generator)
    batch = generator.choice([1, 2, 4])
    keys = [allocate(batch * length * 1024) for _ in range(2)]
    for _ in range(4):  # layers: activations live for a layer
        hidden = allocate(batch * length * HIDDEN)
        attention = allocate(batch * length * HIDDEN)
        wide = allocate(batch * length * HIDDEN * 3.5)
        del attention
        out = allocate(batch * length * HIDDEN)
        del wide, hidden, out
    requests.append(keys)
    # Requests end in no order.
    while len(requests) > 48 or (requests and generator.random() < 0.2):
        requests.rotate(generator.randrange(len(requests)))
        requests.popleft()


def measure_peak(args):
    generator = random.Random(args.seed)
    requests = collections.deque()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(args.steps):
        step(generator, requests)
    return {
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "seconds": round(time.perf_counter() - begin, 2),
        "segments_made": torch.cuda.memory_stats()["segment.all.allocated"],
    }


def measure_oom(args):
    """How much is in use when memory is out under the cap, with requests of mixed lengths coming and going."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(args.cap_gib * GIB / total)
    generator = random.Random(args.seed + 1)
    kept, steps = [], 0
    try:
        while True:
            kept.append(allocate(generator.choice([1, 2, 4]) * sequence_length(generator) * 1024))
            steps += 1
            if steps % 3 == 0:
                del kept[generator.randrange(len(kept))]
            if steps % 7 == 0:
                allocate(sequence_length(generator) * HIDDEN * 2)
    except torch.cuda.OutOfMemoryError:
        return {"oom_allocated": torch.cuda.memory_allocated(), "oom_reserved": torch.cuda.memory_reserved(),
                "oom_steps": steps}


def main():
    args = arguments()
    weights = load(args.weights_gib, "load_weights")
    cache = load(1, "kv_cache")
    seen = measure_peak(args)
    seen.update(measure_oom(args))
    seen["weights"] = sum(p.nbytes for p in weights + cache)
    seen["expandable"] = sum(s["is_expandable"] for s in torch.cuda.memory_snapshot())
    seen["plain"] = len(torch.cuda.memory_snapshot()) - seen["expandable"]
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
