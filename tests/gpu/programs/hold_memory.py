"""Takes GPU memory like another tenant: all but the bytes given as argument, until a line comes on standard input.

Says `held BYTES`. Uses the driver alone, so that it starts at once.
"""
import ctypes
import sys

PIECE = 256 << 20


def check(result, what):
    if result != 0:
        sys.exit(f"{what} returned {result}")


def main():
    leave = int(sys.argv[1])
    cuda = ctypes.CDLL("libcuda.so.1")
    check(cuda.cuInit(0), "cuInit")
    context = ctypes.c_void_p()
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), "cuDevicePrimaryCtxRetain")
    check(cuda.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    held = 0
    while True:
        check(cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "cuMemGetInfo")
        if free.value < leave + PIECE:
            break
        address = ctypes.c_uint64()
        if cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(PIECE)) != 0:
            break
        held += PIECE
    print(f"held {held}", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
