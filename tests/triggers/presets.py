"""A rule, and the presets on stand-ins for the programs that they know, with memory of the driver that the process
finds: run by presets_test.sh, once for each generation."""

import ctypes
import os
import sys
import unittest

library = ctypes.CDLL(None)
library.dormouse_current_tag.restype = ctypes.c_char_p
cuda = ctypes.CDLL("libcuda.so.1")

torch = sys.modules["torch"] = type(sys)("torch")
torch.written = []
torch.write_settings = torch.written.append
torch.settings_in_force = lambda: os.environ["PYTORCH_CUDA_ALLOC_CONF"]
torch.cuda = type("cuda", (), {"empty_cache": staticmethod(lambda: None)})

GENERATION = os.environ["STANDIN_GENERATION"]
MIB = 1 << 20


def tag():
    return library.dormouse_current_tag().decode()


class Memory:
    """Device memory of 2 MiB that begins with a byte."""

    def __init__(self, byte=0):
        self.address = ctypes.c_uint64()
        check(cuda.cuMemAlloc_v2(ctypes.byref(self.address), ctypes.c_size_t(2 * MIB)))
        check(cuda.cuMemsetD8_v2(self.address, ctypes.c_ubyte(byte), ctypes.c_size_t(2 * MIB)))

    def byte(self):
        value = ctypes.c_ubyte()
        check(cuda.cuMemcpyDtoH_v2(ctypes.byref(value), self.address, ctypes.c_size_t(1)))
        return value.value


def check(result):
    assert result == 0, f"the driver's error {result}"


def free_memory():
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    check(cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
    return free.value


def use_device():
    check(cuda.cuInit(0))
    context = ctypes.c_void_p()
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
    check(cuda.cuCtxSetCurrent(context))


class Kept(unittest.TestCase):
    def test_the_allocator_starts_and_never_writes_the_settings(self):
        from vllm.device_allocator.cumem import CuMemAllocator

        allocator = CuMemAllocator()
        for name, expected in (("kv_cache", "kv_cache"), (None, "default"), ("a b", "a_b")):
            with allocator.use_memory_pool(name) as got:
                self.assertEqual((got, tag()), ("theirs", expected))
        with allocator.use_memory_pool(tag="weights"):
            self.assertEqual(tag(), "weights")
        self.assertEqual((tag(), torch.written), ("", []))
        self.assertEqual(allocator.sleep(), "their sleep")
        self.assertIn("expandable_segments:True", os.environ["PYTORCH_CUDA_ALLOC_CONF"])


class Replaced(unittest.TestCase):
    def test_sleep_and_wake_mean_the_same(self):
        from vllm.device_allocator.cumem import CuMemAllocator

        use_device()
        allocator = CuMemAllocator()
        self.assertEqual(allocator.get_current_usage(), 0)
        with allocator.use_memory_pool("weights"):
            weights = Memory(7)
        with allocator.use_memory_pool(tag="kv_cache"):
            cache = Memory(8)
        with allocator.use_memory_pool():
            other = Memory(9)
        outside = Memory(10)
        self.assertEqual(allocator.get_current_usage(), 6 * MIB)
        before = free_memory()
        self.assertIsNone(allocator.sleep(offload_tags=("weights", "default")))
        self.assertGreaterEqual(free_memory() - before, 6 * MIB)
        self.assertEqual(allocator.get_current_usage(), 6 * MIB)
        self.assertEqual(outside.byte(), 10)
        allocator.sleep(offload_tags=())  # what sleeps keeps what it has
        allocator.wake_up(["weights"])
        self.assertEqual(weights.byte(), 7)
        if GENERATION == "rewrites":
            self.assertEqual(other.byte(), 9)
            allocator.discard("weights")
        allocator.wake_up()
        self.assertEqual((weights.byte(), cache.byte(), other.byte()), (0 if GENERATION == "rewrites" else 7, 0, 9))
        self.assertEqual(torch.written, [])

    def test_a_sleep_outside_of_what_it_made_is_left_alone(self):
        use_device()
        library.dormouse_region_begin(b"mine")
        mine = Memory(3)
        library.dormouse_region_end()
        from vllm.device_allocator.cumem import CuMemAllocator

        CuMemAllocator().sleep(())
        self.assertEqual(mine.byte(), 3)


class MemorySaver(unittest.TestCase):
    def test_the_package_loads_this_library(self):
        from torch_memory_saver.hooks import mode_preload

        ours = mode_preload.HookUtilModePreload().get_path_binary()
        self.assertTrue(ours.endswith("libdormouse.so") and os.path.exists(ours), ours)
        self.assertEqual(mode_preload.get_binary_path_from_package("x_preload"), ours)
        self.assertEqual(mode_preload.get_binary_path_from_package("x_torch"), "/theirs/x_torch")


class Rule(unittest.TestCase):
    def test_memory_made_in_a_named_function_sleeps_and_wakes(self):
        import loader

        use_device()
        weights = loader.load(lambda: Memory(5))
        outside = Memory(6)
        tags = (ctypes.c_char_p * 1)(b"weights")
        before = free_memory()
        self.assertEqual(library.dormouse_sleep(tags, ctypes.c_size_t(1), 0), 0)
        self.assertGreaterEqual(free_memory() - before, 2 * MIB)
        self.assertEqual(outside.byte(), 6)
        self.assertEqual(library.dormouse_wake(tags, ctypes.c_size_t(1)), 0)
        self.assertEqual(weights.byte(), 5)


class Misfit(unittest.TestCase):
    def test_the_program_goes_on(self):
        from vllm.device_allocator.cumem import CuMemAllocator

        self.assertEqual(CuMemAllocator().sleep(), "their sleep")


unittest.main()
