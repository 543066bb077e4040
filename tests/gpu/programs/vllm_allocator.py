"""Uses vLLM's CuMemAllocator as its workers do: answers each command on a line of standard input with one JSON object.

    load GIB CACHE_GIB   several hundred tensors in use_memory_pool("weights"), some large ones in "kv_cache"
    sleep [TAG,TAG...]   allocator.sleep with these tags offloaded, in seconds, and what it freed
    discard TAG,TAG...   allocator.discard (later versions)
    wake [TAG,TAG...]    allocator.wake_up; all without tags
    check TAG            "same" as it was written, "zero", or else
    write                writes the content of kv_cache again
    reenter              a tag that is entered again after a part of its memory was freed outside: what is mapped of it, asleep
                         and awake again, by the allocator's own table (later versions)
    state                usage, settings in force, kinds of segments, whether all addresses are as they were
    quit

Which allocator stands behind it, vLLM's own or one of Dormouse's presets, depends on the environment alone. Copies only, no
kernels of PyTorch's, so that it runs on the simulated driver as well.
"""
import contextlib
import ctypes
import gc
import json
import pathlib
import sys
import time

import torch

from allocator_view import on_thread, segment_is_expandable, settings

MIB, GIB = 1 << 20, 1 << 30
SIZES = [2 * MIB, 12 * MIB, 24 * MIB, 6 * MIB, 32 * MIB, 16 * MIB]  # of weights, in turn
CACHE = 256 * MIB  # of a tensor of the cache, at most
FIRST = {"weights": 0, "kv_cache": 5000}  # where a tag's content begins in the noise


def load_nvrtc():
    """Newer extensions need NVRTC, which PyTorch has beside it and loads only when it wants it."""
    with contextlib.suppress(OSError):  # then the extension says what it misses
        ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"))


def free_memory():
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


class Session:
    def __init__(self, allocator):
        self.allocator = allocator
        self.tags = {}  # tag: tensors
        self.outside = {}  # when: tensor
        self.settings = {}  # when: settings in force

    # A tensor's content is a part of one random text, so that each byte can be told from its neighbours'.

    def noise(self, index, size):
        start = index * 4099 % (64 * MIB)
        return self._noise[start : start + size]

    def _make_noise(self):
        generator = torch.Generator().manual_seed(7)
        words = torch.randint(-(1 << 62), 1 << 62, ((64 * MIB + CACHE) // 8,), dtype=torch.int64, generator=generator)
        self._noise = words.view(torch.uint8)
        self._staging = torch.empty(CACHE, dtype=torch.uint8, pin_memory=True)

    def _sizes(self, total, sizes):
        index = 0
        while total >= 2 * MIB:
            size = min(sizes[index % len(sizes)], total)
            yield index, size
            total -= size
            index += 1

    def _allocate(self, tag, total, sizes):
        tensors = self.tags[tag] = []
        with self.allocator.use_memory_pool(tag):
            self.settings[tag] = settings()
            for index, size in self._sizes(total, sizes):
                tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
                tensor.copy_(self.noise(FIRST[tag] + index, size))
                tensors.append(tensor)
            self.outside[tag] = on_thread(lambda: torch.empty(30 * MIB, dtype=torch.uint8, device="cuda"))

    def load(self, gib, cache_gib):
        self._make_noise()
        self.outside["before"] = torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")
        self.settings["before"] = settings()
        begin = time.perf_counter()
        self._allocate("weights", int(float(gib) * GIB), SIZES)
        self._allocate("kv_cache", int(float(cache_gib) * GIB), [CACHE])
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        self.outside["after"] = torch.empty(40 * MIB, dtype=torch.uint8, device="cuda")
        self.settings["after"] = settings()
        self.addresses = self._addresses()
        return {
            "seconds": seconds,
            "bytes": {tag: sum(t.numel() for t in tensors) for tag, tensors in self.tags.items()},
            "tensors": {tag: len(tensors) for tag, tensors in self.tags.items()},
        }

    def _addresses(self):
        return [tensor.data_ptr() for tensors in self.tags.values() for tensor in tensors]

    # --- What vLLM's endpoints end in.

    def _timed(self, function, *arguments):
        before = free_memory()
        begin = time.perf_counter()
        function(*arguments)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "freed": free_memory() - before}

    def sleep(self, tags=""):
        return self._timed(self.allocator.sleep, tuple(tags.split(",")) if tags else ())

    def discard(self, tags):
        return self._timed(self.allocator.discard, tuple(tags.split(",")))

    def wake(self, tags=""):
        return self._timed(self.allocator.wake_up, tags.split(",") if tags else None)

    # --- What it finds.

    def check(self, tag):
        kinds = set()
        for index, tensor in enumerate(self.tags[tag]):
            here = self._staging[: tensor.numel()]
            here.copy_(tensor)
            if torch.equal(here, self.noise(FIRST[tag] + index, tensor.numel())):
                kinds.add("same")
            else:
                kinds.add("other" if here.any() else "zero")
        return {"content": kinds.pop() if len(kinds) == 1 else sorted(kinds)}

    def write(self):
        for index, tensor in enumerate(self.tags["kv_cache"]):
            tensor.copy_(self.noise(FIRST["kv_cache"] + index, tensor.numel()))
        torch.cuda.synchronize()
        return {}

    def reenter(self):
        size = 64 * MIB

        def mapped():
            data = [each for each in self.allocator.pointer_to_data.values() if each.tag == "again"]
            return sum(each.handle[1] for each in data if not each.is_asleep) / size

        with self.allocator.use_memory_pool("again"):
            first = torch.empty(size, dtype=torch.uint8, device="cuda")
        with self.allocator.use_memory_pool("again"):
            second = torch.empty(size, dtype=torch.uint8, device="cuda")
        found = [mapped()]
        del first
        with self.allocator.use_memory_pool("again"):
            pass
        found.append(mapped())
        second.copy_(self.noise(1, size))
        self.allocator.sleep(("weights", "kv_cache", "again"))
        found.append(mapped())
        self.allocator.wake_up()
        found.append(mapped())
        return {"mapped": found, "same": torch.equal(second.cpu(), self.noise(1, size))}

    def state(self):
        segments = torch.cuda.memory_snapshot()
        inside = {tag: [segment_is_expandable(t, segments) for t in tensors] for tag, tensors in self.tags.items()}
        return {
            "addresses_same": self._addresses() == self.addresses,
            "usage": self.allocator.get_current_usage(),
            "settings": self.settings,
            "now": settings(),
            "inside_expandable": {tag: sum(kinds) for tag, kinds in inside.items()},
            "outside_expandable": {when: segment_is_expandable(t, segments) for when, t in self.outside.items()},
        }

    def close(self):
        """Memory goes before its pools and these before their allocators, as the latest version has it: others may end
        by an abort."""
        self.tags.clear()
        self.outside.clear()
        gc.collect()
        torch.cuda.empty_cache()
        kept = list(self.allocator.allocator_and_pools.values())
        self.allocator.allocator_and_pools.clear()
        allocators = [entry[1] for each in kept for entry in (each if isinstance(each, list) else [each])]
        kept.clear()
        gc.collect()
        allocators.clear()


def say(answer):
    print("= " + json.dumps(answer), flush=True)


def make_allocator():
    torch.cuda.init()
    load_nvrtc()
    try:
        from vllm.device_allocator.cumem import CuMemAllocator, cumem_available
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # a library that it needs
        say({"cannot": str(error)})
        return None
    try:
        allocator = CuMemAllocator.get_instance()
    except AssertionError as error:
        say({"refused": str(error)})
        return None
    say({"torch": torch.__version__, "available": cumem_available})
    return allocator


def main():
    allocator = make_allocator()
    if allocator is None:
        return
    session = Session(allocator)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "quit":
            break
        try:
            say(getattr(session, command)(*arguments))
        except Exception as error:  # noqa: BLE001  the test judges
            say({"error": f"{type(error).__name__}: {error}"})
    session.close()


if __name__ == "__main__":
    main()
