"""Uses SGLang's adapter of torch_memory_saver as its engine and scheduler do: this process starts a worker in
configure_subprocess(), which answers each command on a line of standard input with one JSON object.

    load GIB CACHE_GIB   tensors in region("weights"), with a backup where the adapter knows of one, and in region("kv_cache")
    pause TAG            adapter.pause, in seconds, and what it freed
    resume TAG           adapter.resume, in seconds
    check TAG            "same" as it was written, or "other"
    write TAG            writes its content again
    state                settings in force, kinds of segments, whether all addresses are as they were
    quit

Copies only, no kernels of PyTorch's, so that it runs on the simulated driver as well.
"""
import importlib
import inspect
import json
import multiprocessing
import os
import sys
import time

import torch

from allocator_view import on_thread, segment_is_expandable, settings

MIB, GIB = 1 << 20, 1 << 30
BLOCK = 64 * MIB


def adapter_module():
    for name in ("sglang.srt.utils.torch_memory_saver_adapter", "sglang.srt.torch_memory_saver_adapter"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("sglang"):
                raise
    raise ModuleNotFoundError("no adapter of SGLang's on Python's path")


class Worker:
    def __init__(self):
        self.adapter = adapter_module().TorchMemorySaverAdapter.create(enable=True)
        self.tags, self.outside, self.settings = {}, {}, {}
        self.noise = torch.randint(-(1 << 62), 1 << 62, (2 * BLOCK // 8,), dtype=torch.int64,
                                   generator=torch.Generator().manual_seed(3))

    def _content(self, tag, index, size):
        start = (index * 4099 + len(tag)) % (BLOCK // 8)
        return self.noise[start : start + size // 8]

    def _region(self, tag):
        knows = "enable_cpu_backup" in inspect.signature(self.adapter.region).parameters
        return self.adapter.region(tag, **({"enable_cpu_backup": True} if knows and tag == "weights" else {}))

    def _allocate(self, tag, total):
        with self._region(tag):
            self.settings[tag] = settings()
            self.tags[tag] = [torch.empty(BLOCK // 8, dtype=torch.int64, device="cuda") for _ in range(total // BLOCK)]
            self.outside[tag] = on_thread(lambda: torch.empty(30 * MIB, dtype=torch.uint8, device="cuda"))
        self.write(tag)

    def load(self, gib, cache_gib):
        self.outside["before"] = torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")
        self.settings["before"] = settings()
        for tag, size in (("weights", gib), ("kv_cache", cache_gib)):
            self._allocate(tag, int(float(size) * GIB))
        self.outside["after"] = torch.empty(40 * MIB, dtype=torch.uint8, device="cuda")
        self.settings["after"] = settings()
        self.addresses = self._addresses()
        return {"bytes": {tag: len(tensors) * BLOCK for tag, tensors in self.tags.items()}}

    def _addresses(self):
        return [tensor.data_ptr() for tensors in self.tags.values() for tensor in tensors]

    def _timed(self, function, tag):
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        begin = time.perf_counter()
        function(tag)
        torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - begin, "freed": torch.cuda.mem_get_info()[0] - before}

    def pause(self, tag):
        return self._timed(self.adapter.pause, tag)

    def resume(self, tag):
        return self._timed(self.adapter.resume, tag)

    def write(self, tag):
        for index, tensor in enumerate(self.tags[tag]):
            tensor.copy_(self._content(tag, index, BLOCK))
        torch.cuda.synchronize()
        return {}

    def check(self, tag):
        same = [torch.equal(tensor.cpu(), self._content(tag, index, BLOCK)) for index, tensor in enumerate(self.tags[tag])]
        return {"content": "same" if all(same) else "other"}

    def state(self):
        segments = torch.cuda.memory_snapshot()
        return {
            "enabled": self.adapter.enabled,
            "addresses_same": self._addresses() == self.addresses,
            "settings": self.settings,
            "inside_expandable": {
                tag: sum(segment_is_expandable(tensor, segments) for tensor in tensors) for tag, tensors in self.tags.items()
            },
            "outside_expandable": {when: segment_is_expandable(t, segments) for when, t in self.outside.items()},
        }


def answer_commands(pipe):
    torch.cuda.init()
    try:
        worker = Worker()
        with worker._region("weights"):  # what it is made of comes with the first region
            pass
        pipe.send({"pid": os.getpid(), "torch": torch.__version__, "preloaded": os.environ.get("LD_PRELOAD", "")})
    except Exception as error:  # noqa: BLE001  the test judges
        return pipe.send({"refused": f"{type(error).__name__}: {error}"})
    while True:
        command, *arguments = pipe.recv().split()
        if command == "quit":
            return pipe.send({})
        try:
            pipe.send(getattr(worker, command)(*arguments))
        except Exception as error:  # noqa: BLE001  the test judges
            pipe.send({"error": f"{type(error).__name__}: {error}"})


def main():
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    with adapter_module().TorchMemorySaverAdapter.create(enable=True).configure_subprocess():
        child = processes.Process(target=answer_commands, args=(theirs,))
        child.start()
    theirs.close()

    def say_answer():
        print("= " + json.dumps(ours.recv()), flush=True)

    say_answer()  # the worker's greeting
    for line in sys.stdin:
        try:
            ours.send(line)
            say_answer()
        except (EOFError, ConnectionError):
            break
        if line.split() == ["quit"]:
            break
    child.join(60)
    sys.exit(child.exitcode)


if __name__ == "__main__":
    main()
