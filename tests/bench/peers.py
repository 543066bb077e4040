"""What others do to put PyTorch's memory to sleep, on the same sizes as sleep_bench and in the same format.

  saver         torch_memory_saver with CPU backup, its own preload library (must be in LD_PRELOAD; scripts/bench does it)
  saver-retain  the same, told to keep its backups
  vllm          what vLLM's CuMemAllocator does for each segment: a pinned torch.empty and a blocking copy, and back.
                Only the copies are done and timed, not the mapping of memory that it does beside them.

Blocks are tensors: PyTorch puts those under 10 MiB into segments of 20 MiB, and these are what a peer handles.
"""
import argparse
import json
import time

import torch

KIB = 1 << 10
GIB = 1 << 30


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["saver", "saver-retain", "vllm"])
    parser.add_argument("--gib", type=float, default=1)
    parser.add_argument("--block-kib", type=int, default=32 * 1024)
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def timed(work):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def report(args, what, count, seconds):
    size = count * args.block_kib * KIB
    print(json.dumps({
        "peer": args.peer, "what": what, "gib": round(size / GIB, 2), "blocks": count, "block_kib": args.block_kib,
        "seconds": round(seconds, 6), "gb_per_s": round(size / 1e9 / seconds, 2),
    }), flush=True)


def allocate(args):
    count = int(args.gib * GIB) // (args.block_kib * KIB)
    blocks = [torch.empty(args.block_kib * KIB // 8, dtype=torch.int64, device="cuda") for _ in range(count)]
    for number, block in enumerate(blocks):
        block.random_(generator=torch.Generator(device="cuda").manual_seed(number))
    return blocks


def digests(blocks):
    return [int((block * 31 + 7).sum()) for block in blocks[:: max(1, len(blocks) // 16)]]


def saver(args):
    from torch_memory_saver import torch_memory_saver

    if args.peer == "saver-retain":
        torch_memory_saver.retain_cpu_backup = True
    with torch_memory_saver.region(tag="weights", enable_cpu_backup=True):
        blocks = allocate(args)
    expected = digests(blocks)
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    for round_ in range(args.rounds + 1):
        what = "first sleep" if round_ == 0 else "sleep again, unchanged"
        report(args, what, len(blocks), timed(lambda: torch_memory_saver.pause("weights")))
        freed = torch.cuda.mem_get_info()[0] - before
        if freed < 0.9 * args.gib * GIB:
            raise SystemExit(f"pause freed only {freed} bytes")
        report(args, "wake", len(blocks), timed(lambda: torch_memory_saver.resume("weights")))
    if digests(blocks) != expected:
        raise SystemExit("contents differ")


def vllm(args):
    blocks = allocate(args)
    backups = {}

    def sleep():
        for number, block in enumerate(blocks):
            if number not in backups:
                backups[number] = torch.empty(block.numel(), dtype=block.dtype, pin_memory=True)
            backups[number].copy_(block)

    def wake():
        for number, block in enumerate(blocks):
            block.copy_(backups[number])

    for round_ in range(args.rounds + 1):
        # Its backups are dropped on waking and come again from PyTorch's cache of pinned memory.
        what = "first sleep" if round_ == 0 else "sleep again, unchanged"
        report(args, what, len(blocks), timed(sleep))
        report(args, "wake", len(blocks), timed(wake))


def main():
    args = arguments()
    if args.peer == "vllm":
        vllm(args)
    else:
        saver(args)


if __name__ == "__main__":
    main()
