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
torch.cuda.memory = type("memory", (), {})
torch.cuda.memory._snapshot = lambda: {"allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": torch.settings_in_force()}}
torch._C = type("_C", (), {"_accelerator_setAllocatorSettings": staticmethod(torch.written.append)})

GENERATION = os.environ["STANDIN_GENERATION"]
MIB = 1 << 20


def tag():
    return library.dormouse_current_tag().decode()


torch.tag = tag


class Memory:
    """Device memory of 2 MiB that begins with a byte."""

    living = []

    def __init__(self, byte=0):
        self.address = ctypes.c_uint64()
        check(cuda.cuMemAlloc_v2(ctypes.byref(self.address), ctypes.c_size_t(2 * MIB)))
        self.living.append(self)
        self.fill(byte)

    def fill(self, byte):
        check(cuda.cuMemsetD8_v2(self.address, ctypes.c_ubyte(byte), ctypes.c_size_t(2 * MIB)))

    def free(self):
        self.living.remove(self)
        check(cuda.cuMemFree_v2(self.address))

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

    def test_what_its_wake_maps_again_has_its_tag(self):
        from vllm.device_allocator import cumem

        allocator = cumem.CuMemAllocator()
        for name in ("weights", "kv_cache"):
            with allocator.use_memory_pool(name):
                pass
        self.assertEqual(allocator.wake_up(), "their wake")
        self.assertEqual((cumem.mapped, tag()), ([(0, "weights"), (1, "kv_cache")], ""))

    def test_an_exception_ends_the_region(self):
        from vllm.device_allocator.cumem import CuMemAllocator

        allocator = CuMemAllocator()
        with self.assertRaises(KeyError):
            with allocator.use_memory_pool("weights"):
                raise KeyError("theirs")
        self.assertEqual(tag(), "")


class Replaced(unittest.TestCase):
    def tearDown(self):
        for memory in list(Memory.living):
            memory.free()

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

    def allocator(self):
        """With weights and kv_cache of one block each, of the bytes 7 and 8."""
        from vllm.device_allocator.cumem import CuMemAllocator

        use_device()
        allocator = CuMemAllocator()
        with allocator.use_memory_pool("weights"):
            weights = Memory(7)
        with allocator.use_memory_pool("kv_cache"):
            cache = Memory(8)
        return allocator, weights, cache

    def test_without_memory_there_is_nothing_to_do(self):
        from vllm.device_allocator.cumem import CuMemAllocator

        allocator = CuMemAllocator()
        for step in range(2):
            self.assertIsNone(allocator.sleep())
            self.assertIsNone(allocator.sleep(("weights",)))
            self.assertIsNone(allocator.wake_up())
            self.assertIsNone(allocator.wake_up(["weights"]))
            self.assertEqual(allocator.get_current_usage(), 0)
            if step == 0:  # now with a tag that has none, beside one that has
                use_device()
                with allocator.use_memory_pool("weights"):
                    pass
        with allocator.use_memory_pool("kv_cache"):
            cache = Memory(8)
        before = free_memory()
        allocator.sleep(("weights", "kv_cache"))
        self.assertGreaterEqual(free_memory() - before, 2 * MIB)
        allocator.wake_up()
        self.assertEqual(cache.byte(), 8)

    def test_offload_tags_are_a_tuple_a_name_or_the_default(self):
        allocator, weights, cache = self.allocator()
        with allocator.use_memory_pool():
            other = Memory(9)
        for offload, kept in ((("weights", "kv_cache"), "wk"), ("weights", "w"), (None, "o"), (("none such",), "")):
            for memory, byte in ((weights, 7), (cache, 8), (other, 9)):
                memory.fill(byte)
            allocator.sleep(offload)
            allocator.wake_up()
            found = (weights.byte(), cache.byte(), other.byte())
            self.assertEqual(found, tuple(byte if name in kept else 0 for name, byte in (("w", 7), ("k", 8), ("o", 9))))
        with self.assertRaises(AssertionError):
            allocator.sleep(["weights"])
        self.assertEqual(weights.byte(), 0)  # awake

    def test_a_second_sleep_changes_nothing_of_what_sleeps(self):
        allocator, weights, cache = self.allocator()
        allocator.sleep(("weights",))
        free = free_memory()
        allocator.sleep(("kv_cache",))
        allocator.sleep(())
        self.assertEqual(free_memory(), free)
        allocator.wake_up()
        self.assertEqual((weights.byte(), cache.byte()), (7, 0))

    def test_waking_what_is_awake_leaves_it(self):
        allocator, weights, cache = self.allocator()
        allocator.wake_up()
        allocator.wake_up(["weights"])
        self.assertEqual((weights.byte(), cache.byte()), (7, 8))
        allocator.sleep(("weights", "kv_cache"))
        allocator.wake_up([])
        allocator.wake_up(["none such"])
        allocator.wake_up(["weights"])
        weights.fill(5)
        allocator.wake_up()
        self.assertEqual((weights.byte(), cache.byte()), (5, 8))

    def test_of_a_tag_that_sleeps_in_part_only_the_rest_falls_asleep(self):
        allocator, weights, cache = self.allocator()
        allocator.sleep(("weights", "kv_cache"))
        with allocator.use_memory_pool("weights"):
            late = Memory(6)
        self.assertEqual(late.byte(), 6)
        allocator.sleep(())  # discards that alone
        allocator.wake_up()
        self.assertEqual((weights.byte(), cache.byte(), late.byte()), (7, 8, 0))
        allocator.sleep(())  # and now all
        with allocator.use_memory_pool("weights"):
            later = Memory(5)
        allocator.sleep(("weights", "kv_cache"))  # keeps that alone
        allocator.wake_up()
        self.assertEqual((weights.byte(), late.byte(), later.byte()), (0, 0, 5))

    @unittest.skipUnless(GENERATION == "rewrites", "later versions")
    def test_discard_is_of_what_is_awake(self):
        allocator, weights, cache = self.allocator()
        allocator.discard(("none such",))
        allocator.sleep(("weights", "kv_cache"))
        allocator.discard(("weights", "kv_cache"))
        allocator.wake_up()
        self.assertEqual((weights.byte(), cache.byte()), (7, 8))
        before = free_memory()
        allocator.discard("kv_cache")
        self.assertGreaterEqual(free_memory() - before, 2 * MIB)
        allocator.wake_up(["weights"])
        allocator.wake_up(["kv_cache"])
        self.assertEqual((weights.byte(), cache.byte()), (7, 0))

    def test_an_exception_ends_the_region_and_its_memory_stays_tagged(self):
        allocator, weights, _ = self.allocator()
        with self.assertRaises(KeyError):
            with allocator.use_memory_pool("weights"):
                with allocator.use_memory_pool("kv_cache"):
                    late = Memory(6)
                    raise KeyError("theirs")
        self.assertEqual((tag(), allocator.current_tag), ("", "default"))
        outside = Memory(4)
        allocator.sleep(("weights",))
        self.assertEqual(outside.byte(), 4)
        allocator.wake_up()
        self.assertEqual((weights.byte(), late.byte()), (7, 0))

    def test_regions_nest_and_the_innermost_decides(self):
        allocator, weights, _ = self.allocator()
        with allocator.use_memory_pool("weights"):
            with allocator.use_memory_pool("kv_cache"):
                self.assertEqual((tag(), allocator.current_tag), ("kv_cache", "kv_cache"))
            self.assertEqual((tag(), allocator.current_tag), ("weights", "weights"))

    def test_usage_counts_what_lives_asleep_or_awake(self):
        allocator, weights, cache = self.allocator()
        self.assertEqual(allocator.get_current_usage(), 4 * MIB)
        allocator.sleep(("weights",))
        self.assertEqual(allocator.get_current_usage(), 4 * MIB)
        cache.free()
        self.assertEqual(allocator.get_current_usage(), 2 * MIB)
        allocator.wake_up()
        self.assertEqual((allocator.get_current_usage(), weights.byte()), (2 * MIB, 7))

    def test_its_table_tells_address_size_tag_and_whether_it_sleeps(self):
        allocator, weights, cache = self.allocator()

        def table():
            return {at: (data.handle[:3], data.tag, data.is_asleep) for at, data in allocator.pointer_to_data.items()}

        def entry(memory, name, asleep):
            return {memory.address.value: ((0, 2 * MIB, memory.address.value), name, asleep)}

        self.assertEqual(table(), entry(weights, "weights", False) | entry(cache, "kv_cache", False))
        allocator.sleep(("weights",))
        allocator.wake_up(["kv_cache"])
        cache.free()
        self.assertEqual(table(), entry(weights, "weights", True))

    def test_a_tag_that_is_entered_again_gives_back_what_was_freed(self):
        allocator, _, _ = self.allocator()
        asked = []
        torch.cuda.empty_cache = lambda: asked.append(tag())
        with allocator.use_memory_pool("never before"):
            self.assertEqual(asked, [])
        with allocator.use_memory_pool("never before"):
            with allocator.use_memory_pool("never before"):
                pass
        self.assertEqual(asked, [""])

    def test_a_sleep_outside_of_what_it_made_is_left_alone(self):
        use_device()
        library.dormouse_region_begin(b"mine")
        mine = Memory(3)
        library.dormouse_region_end()
        from vllm.device_allocator.cumem import CuMemAllocator

        CuMemAllocator().sleep(())
        self.assertEqual(mine.byte(), 3)


class Refused(unittest.TestCase):
    """With less host memory allowed than the backup takes."""

    def test_a_sleep_that_fails_raises_and_leaves_all_awake(self):
        from vllm.device_allocator.cumem import CuMemAllocator

        use_device()
        allocator = CuMemAllocator()
        with allocator.use_memory_pool("weights"):
            weights = [Memory(7) for _ in range(4)]
        with allocator.use_memory_pool("kv_cache"):
            cache = Memory(8)
        with self.assertRaisesRegex(RuntimeError, "Dormouse: weights: .*DORMOUSE_HOST_LIMIT"):
            allocator.sleep(("weights",))
        self.assertEqual([each.byte() for each in weights], [7] * 4)
        self.assertEqual(cache.byte(), 8)
        allocator.sleep(())
        allocator.wake_up()
        self.assertEqual(weights[0].byte(), 0)


class MemorySaver(unittest.TestCase):
    def test_the_package_loads_this_library(self):
        from torch_memory_saver.hooks import mode_preload

        ours = mode_preload.HookUtilModePreload().get_path_binary()
        self.assertTrue(ours.endswith("libdormouse.so") and os.path.exists(ours), ours)
        from torch_memory_saver import utils

        for module in (mode_preload, utils):
            self.assertEqual(str(module.get_binary_path_from_package("x_preload")), ours)
            self.assertEqual(module.get_binary_path_from_package("x_torch"), "/theirs/x_torch")

    def test_the_package_does_not_refuse_expandable_segments_where_it_is_on_us(self):
        import torch_memory_saver

        saver = torch_memory_saver.TorchMemorySaver()
        for named in ({}, {"hook_mode": "preload"}):
            saver.use(**named)
        self.assertEqual(saver._impl.hook_mode, "preload")
        for mode in ("torch", "another"):
            with self.assertRaisesRegex(RuntimeError, "expandable segments"):
                saver.use(hook_mode=mode)
        saver.use()
        from torch_memory_saver import entrypoint

        self.assertIs(entrypoint.os, os)
        self.assertIn("expandable_segments:True", os.environ["PYTORCH_CUDA_ALLOC_CONF"])


class Server(unittest.TestCase):
    """vLLM without its sleep mode."""

    def test_the_model_and_the_cache_are_tagged(self):
        from vllm.v1.worker.gpu_worker import Worker

        self.assertEqual((Worker().load_model(tag), Worker().initialize_from_config(tag)), ("weights", "kv_cache"))

    def test_the_loaders_own_setting_loses_no_other(self):
        from vllm.v1.worker.gpu_worker import Worker

        torch.written.clear()
        Worker().load_model(tag)
        kept = torch.settings_in_force()
        self.assertEqual(torch.written, [kept + ",max_split_size_mb:20", kept])
        torch.written.clear()
        torch.settings_in_force = lambda: "max_split_size_mb:20,expandable_segments:False"  # as a region has it
        Worker().load_model(tag)
        self.assertEqual(torch.written, [])


class Transformers(unittest.TestCase):
    def test_what_the_loader_makes_is_tagged(self):
        from transformers.modeling_utils import PreTrainedModel

        self.assertEqual(PreTrainedModel.from_pretrained([tag] * 8), ["weights"] * 8)

    def test_layers_of_caches_are_tagged_once_each(self):
        from transformers import cache_utils

        for cls in ("DynamicLayer", "DynamicSlidingWindowLayer", "QuantizedLayer", "Fp8QuantizedLayer"):
            self.assertEqual(getattr(cache_utils, cls)().update(tag), "kv_cache")
        self.assertEqual(cache_utils.StaticLayer().lazy_initialization(tag), "kv_cache")


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


class OldPyTorch(unittest.TestCase):
    """One whose allocator has no memory pools."""

    def test_regions_go_on(self):
        torch.cuda = sys.modules["torch.cuda"] = type(sys)("torch.cuda")
        torch.cuda.is_initialized = lambda: True
        torch._C = sys.modules["torch._C"] = type(sys)("torch._C")
        for _ in range(2):
            self.assertEqual(library.dormouse_region_begin(b"weights"), 0)
            self.assertEqual(tag(), "weights")
            self.assertEqual(library.dormouse_region_end(), 0)


class Nowhere(unittest.TestCase):
    def test_the_program_goes_on(self):
        use_device()
        use_device()
        self.assertEqual(tag(), "")


class Misfit(unittest.TestCase):
    def test_the_program_goes_on(self):
        from vllm.device_allocator.cumem import CuMemAllocator

        self.assertEqual(CuMemAllocator().sleep(), "their sleep")


unittest.main()
