"""What an allocation that PyTorch's cache serves costs, outside any region: one JSON object a size, with the least of many
repetitions (what is above it is the machine's noise). scripts/bench runs it with and without the library.
"""
import ctypes
import json
import os
import pathlib
import subprocess
import sys

SIZES = {"512 bytes": 512, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
CALLS = 2000
REPETITIONS = 400
SOURCE = pathlib.Path(__file__).with_suffix(".cc")


def build(path):
    """Against the PyTorch that this Python imports."""
    import torch

    folder = pathlib.Path(torch.__file__).parent
    cuda = pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    subprocess.run(
        ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-w", SOURCE, "-o", path, f"-I{folder / 'include'}",
         f"-I{cuda / 'include'}", f"-L{folder / 'lib'}", "-lc10_cuda", "-lc10"], check=True)


def measure(path):
    import torch

    torch.cuda.init()
    allocation_ns = ctypes.CDLL(path).allocation_ns
    allocation_ns.argtypes, allocation_ns.restype = [ctypes.c_size_t, ctypes.c_int], ctypes.c_double
    for name, size in SIZES.items():
        least = min(allocation_ns(size, CALLS) for _ in range(REPETITIONS))
        print(json.dumps({"what": name, "call_ns": round(least, 2)}), flush=True)


if __name__ == "__main__":
    {"build": build, "measure": measure}[sys.argv[1]](sys.argv[2])
