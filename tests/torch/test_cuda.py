"""The real caching allocator of a CUDA build of PyTorch (2.10 or later) under the preloaded library, on
the simulated driver or a real one: which segments are expandable, and whose blocks serve whom.

Started by run.sh with the environment that a program has: LD_PRELOAD, LD_LIBRARY_PATH. Each case runs
in a process of its own, which is told its name; the settings and regions are the case's.
"""

import contextlib
import ctypes
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import unittest

MIB = 1 << 20
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:200"}
lib = ctypes.CDLL(None)


class Region:
    """A region of the C API; None is one without tag."""

    def __init__(self, tag):
        self.tag = tag

    def __enter__(self):
        if self.tag is None:
            lib.dormouse_region_begin_none()
        else:
            assert lib.dormouse_region_begin(self.tag.encode()) == 0

    def __exit__(self, *_):
        assert lib.dormouse_region_end() == 0


def on_thread(function):
    """Runs it on another thread; what it returns, or raises."""
    result = []

    def run():
        try:
            result.append((function(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    # Python's join does not wait for the thread's very end, where it leaves its regions.
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < deadline:
        time.sleep(0.001)
    value, error = result[0]
    if error is not None:
        raise error
    return value


def allocate(mib, device="cuda"):
    import torch

    return torch.empty(mib * MIB, dtype=torch.uint8, device=device)


def segments():
    import torch

    return torch.cuda.memory_snapshot()


def segment_of(tensor):
    address = tensor.data_ptr()
    for segment in segments():
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            return segment
    raise AssertionError("the tensor lies in no segment")


def is_expandable(tensor):
    return segment_of(tensor)["is_expandable"]


def pool_of(tensor):
    return tuple(segment_of(tensor)["segment_pool_id"])


class TagStats(ctypes.Structure):
    """struct dormouse_tag_stats."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("tag", ctypes.c_char * 72),
        ("backup", ctypes.c_int),
        ("device", ctypes.c_int),
        ("allocated", ctypes.c_uint64),
        ("mapped", ctypes.c_uint64),
        ("asleep", ctypes.c_uint64),
        ("backed_up", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 9),
        ("seconds", ctypes.c_double * 2),
    ]


def stat(tag, field):
    """Bytes that the library holds for a tag."""
    stats, count = (TagStats * 64)(), ctypes.c_size_t()
    stats[0].size = ctypes.sizeof(TagStats)
    assert lib.dormouse_stats(stats, 64, ctypes.byref(count)) == 0
    return sum(getattr(s, field) for s in stats[: count.value] if s.tag.decode() == tag)


def allocated(tag):
    return stat(tag, "allocated")


def reserved(pool=None):
    """Bytes in PyTorch's segments, of one pool or of all."""
    return sum(s["total_size"] for s in segments() if pool in (None, tuple(s["segment_pool_id"])))


def content_of(tensor, number):
    """Gives the tensor a content of its own; returns it."""
    import torch

    content = torch.full((tensor.numel(),), 1 + number % 250, dtype=torch.uint8)
    tensor.copy_(content)
    return content


def torch_version():
    import torch

    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def gives_back_alone():
    """Whether what is free in given-up pools goes back by itself as a region ends (PyTorch 2.8 to 2.12).
    From 2.13 on it goes back with everything else that is free, when the program empties the cache."""
    return torch_version() < (2, 13)


def the_library_is_to_say(text):
    """In one message of its own; says_what_it_should() looks for it."""
    print(f"{TO_BE_SAID}{text}", flush=True)


def allocator_settings():
    import torch

    return torch.cuda.memory._snapshot()["allocator_settings"]


def pinned(mib):
    import torch

    return torch.empty(mib * MIB, dtype=torch.uint8, pin_memory=True)


def pinned_mib():
    """What PyTorch holds of pinned memory, cached blocks included."""
    import torch

    return torch.cuda.host_memory_stats()["allocated_bytes.current"] / MIB


DEFAULT = (0, 0)
TO_BE_SAID = "the library is to say: "


# --- The cases. Each runs in a process of its own: python test_cuda.py CASE


def only_the_threads_region_is_suspended():
    outside = allocate(30)
    with Region("weights"):
        inside = allocate(40)
        meanwhile = on_thread(lambda: allocate(50))
    after = allocate(60)
    assert is_expandable(outside) and is_expandable(meanwhile) and is_expandable(after)
    assert not is_expandable(inside)
    assert allocated("weights") == 40 * MIB


def all_other_settings_read_the_same():
    allocate(1)
    outside = allocator_settings()
    with Region("weights"):
        inside = allocator_settings()
    for key, value in outside.items():
        if key == "expandable_segments":
            assert value is True and inside[key] is False
        elif key != "PYTORCH_CUDA_ALLOC_CONF":
            assert inside[key] == value, key
    assert inside["max_split_size"] == 200 * MIB
    assert allocator_settings() == outside


def expect_left_out(*keys):
    """Keys that can be set for a region from PyTorch 2.14 on."""
    reason = "this PyTorch does not know it." if torch_version() < (2, 13) else "PyTorch before 2.14 would"
    if torch_version() < (2, 14):
        for key in keys:
            the_library_is_to_say(f"{key} cannot be set for a region: {reason}")


def settings_that_this_pytorch_cannot_have_in_a_region_are_left_out_alone():
    allocate(1)
    expect_left_out("pinned_max_cached_size_mb", "pinned_max_round_threshold_mb")
    for _ in range(2):
        with Region("weights"):
            weights = allocate(40)
            assert allocator_settings()["max_split_size"] == 300 * MIB
            assert not is_expandable(weights)
            assert is_expandable(on_thread(lambda: allocate(30)))
            assert on_thread(allocator_settings)["max_split_size"] == 200 * MIB
        with Region("kv_cache"):
            assert not is_expandable(allocate(40))
        assert is_expandable(allocate(50))


def settings_that_this_pytorch_cannot_have_for_the_process_are_left_out_alone():
    expect_left_out("pinned_max_cached_size_mb")
    tagged = allocate(40)
    assert not is_expandable(tagged)
    assert allocator_settings()["max_split_size"] == 300 * MIB
    with Region(None):
        assert is_expandable(allocate(40))


def a_program_that_does_not_use_cuda_hears_nothing_of_settings():
    import torch

    torch._C._accelerator_setAllocatorSettings("max_split_size_mb:99")
    assert not torch.cuda.is_initialized()


def pinned_memory_in_a_region_starts_the_background_thread():
    allocate(1)

    def threads():
        """The names of all threads; the driver's come and go beside the pool's."""
        found = []
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm") as file:
                found.append(file.read().strip())
        return found

    def in_pools():
        return threads().count("CaffeTaskThread")

    kept = [pinned(1)]
    before = in_pools()
    kept.append(pinned(2))
    with Region("weights"):
        kept.append(on_thread(lambda: pinned(4)))
        assert in_pools() == before, threads()
        kept.append(pinned(8))
        deadline = time.monotonic() + 10  # the thread names itself
        while in_pools() == before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert in_pools() == before + 1, threads()


def pinned_memory_follows_the_region_of_who_allocates_and_frees():
    if torch_version() < (2, 14):
        print("skipped: before PyTorch 2.14 a region cannot have these settings")
        sys.exit(77)
    allocate(1)
    held = pinned_mib()
    with Region("weights"):  # above 4 MiB not rounded, above 16 MiB not cached
        inside, outside = pinned(5), on_thread(lambda: pinned(5))
        assert pinned_mib() == held + 5 + 8
        address = inside.data_ptr()
        del inside
        assert pinned_mib() == held + 5 + 8
    # The region's block is cached for all, and too small for what is larger.
    larger = pinned(7)
    assert larger.data_ptr() != address
    assert pinned_mib() == held + 5 + 8 + 8
    with Region("weights"):
        again = pinned(5)
        assert again.data_ptr() == address
        held = pinned_mib()
        freed = [pinned(20), on_thread(lambda: pinned(20)), pinned(20)]
        assert pinned_mib() == held + 20 + 32 + 20
        freed.pop()
        assert pinned_mib() == held + 20 + 32
        freed.pop()
        assert pinned_mib() == held + 20
    del freed[0]  # by a thread outside
    assert pinned_mib() == held + 20
    assert outside.numel() == 5 * MIB


def no_cached_block_crosses_the_border():
    with Region("weights"):
        inside = allocate(40)
        address = inside.data_ptr()
        del inside
    outside = allocate(40)
    assert outside.data_ptr() != address, "a region's cached block served the rest of the program"
    free_outside = outside.data_ptr()
    del outside
    with Region("weights"):
        again = allocate(40)
        assert again.data_ptr() == address, "the region's own cached block was not used"
        assert allocate(40).data_ptr() != free_outside
    with Region("kv_cache"):
        assert allocate(40).data_ptr() not in (address, free_outside)
    # Small blocks have free lists of their own.
    import torch

    with Region("weights"):
        small = torch.empty(1000, dtype=torch.uint8, device="cuda")
        small_address = small.data_ptr()
        del small
    other = torch.empty(1000, dtype=torch.uint8, device="cuda")
    assert other.data_ptr() != small_address


def an_allocator_without_pools_is_named():
    the_library_is_to_say("PyTorch's allocator here is cudaMallocAsync, which has no memory pools")
    with Region("weights"):
        one = allocate(4)
    with Region("weights"):
        other = allocate(4)
    assert allocated("weights") >= 8 * MIB, allocated("weights")
    del one, other


def the_innermost_region_decides():
    with Region("weights"):
        weights = allocate(40)
        with Region(None):
            untagged = allocate(40)
            with Region("kv_cache"):
                cache = allocate(40)
            untagged_again = allocate(40)
        weights_again = allocate(40)
    assert not is_expandable(weights) and not is_expandable(weights_again)
    assert not is_expandable(cache)
    assert is_expandable(untagged) and is_expandable(untagged_again)
    assert pool_of(weights) == pool_of(weights_again) != DEFAULT
    assert pool_of(cache) not in (DEFAULT, pool_of(weights))
    assert pool_of(untagged) == DEFAULT
    assert allocated("weights") == 80 * MIB and allocated("kv_cache") == 40 * MIB


def a_region_may_begin_before_torch_is_imported():
    assert "torch" not in sys.modules
    with Region("weights"):
        inside = allocate(40)
        assert not is_expandable(inside) and pool_of(inside) != DEFAULT
    outside = allocate(40)
    assert is_expandable(outside) and pool_of(outside) == DEFAULT
    import torch

    assert type(torch.cuda.__loader__).__name__ == "SourceFileLoader"


def a_region_may_begin_before_cuda_is_initialised():
    import torch

    assert not torch.cuda.is_initialized()
    with Region("weights"):
        inside = allocate(40)
        assert not is_expandable(inside) and pool_of(inside) != DEFAULT
    assert pool_of(allocate(40)) == DEFAULT


def a_region_may_end_before_cuda_is_initialised():
    with Region("weights"):
        import torch
    assert not torch.cuda.is_initialized()
    outside = allocate(40)
    assert is_expandable(outside) and pool_of(outside) == DEFAULT


def threads_inside_one_tag_at_once_have_their_own_pools():
    barrier = threading.Barrier(4)
    allocate(1)
    pools = []

    def run():
        for _ in range(25):
            with Region("weights"):
                barrier.wait()
                pools.append(pool_of(allocate(4)))
                barrier.wait()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert DEFAULT not in pools
    assert len(pools) == 100 and len(set(pools)) == 4, set(pools)
    for _ in range(10):
        with Region("weights"):
            assert pool_of(allocate(4)) in pools


def a_tag_keeps_its_pool():
    pools = set()
    for _ in range(50):
        with Region("weights"):
            with Region("weights"):
                pools.add(pool_of(allocate(4)))
    assert len(pools) == 1


def a_thread_that_ends_inside_a_region_gives_its_pool_back():
    allocate(1)
    pools = set()

    def end_inside():
        lib.dormouse_region_begin(b"weights")
        pools.add(pool_of(allocate(4)))

    for _ in range(10):
        on_thread(end_inside)
        outside = on_thread(lambda: allocate(4))
        assert is_expandable(outside) and pool_of(outside) == DEFAULT
    assert len(pools) == 1, pools


def each_device_has_a_pool_of_the_tag():
    import torch

    if torch.cuda.device_count() < 2:
        print("skipped: there is one device")
        sys.exit(77)
    first, second = allocate(4, "cuda:0"), allocate(4, "cuda:1")
    with Region("weights"):
        inside = [allocate(40, "cuda:0"), allocate(40, "cuda:1")]
    for tensor in inside:
        assert not is_expandable(tensor) and pool_of(tensor) != DEFAULT
    assert is_expandable(first) and is_expandable(second)


def the_programs_own_pools_work_in_and_around_regions():
    import torch

    mine = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(mine):
        with Region("weights"):
            allocate(4)
        own = allocate(40)
    assert pool_of(own) == tuple(mine.id)
    with Region("weights"):
        with torch.cuda.use_mem_pool(mine):
            allocate(4)
        inside = allocate(40)
        assert pool_of(inside) not in (DEFAULT, tuple(mine.id))
    assert pool_of(allocate(40)) == DEFAULT


def a_pool_of_the_program_does_not_carry_memory_across_a_regions_border():
    import torch

    mine = torch.cuda.MemPool()
    with Region("weights"):  # from the first one on, the program's pools are known
        allocate(1)
    with torch.cuda.use_mem_pool(mine):
        before = allocate(40)
        del before  # stays cached in the pool
        with Region("kv_cache"):
            inside = allocate(40)
            assert pool_of(inside) not in (DEFAULT, tuple(mine.id))
            with Region("weights"):
                assert pool_of(allocate(40)) not in (DEFAULT, tuple(mine.id), pool_of(inside))
        del inside
        assert pool_of(allocate(40)) == tuple(mine.id)
    with Region("kv_cache"):
        with torch.cuda.use_mem_pool(mine):
            assert pool_of(allocate(60)) not in (DEFAULT, tuple(mine.id))
    with torch.cuda.use_mem_pool(mine):
        outside = allocate(60)
        content = content_of(outside, 7)
        assert pool_of(outside) == tuple(mine.id)
    assert lib.dormouse_sleep(None, 0, 0) == 0
    assert lib.dormouse_wake(None, 0) == 0
    assert torch.equal(outside.cpu(), content)
    entered = torch.cuda.use_mem_pool(mine)
    entered.__enter__()
    with Region("kv_cache"):
        entered.__exit__(None, None, None)  # left while the region goes on
        assert pool_of(allocate(40)) != DEFAULT
    assert pool_of(allocate(40)) == DEFAULT
    assert mine.use_count() == 1


def a_pool_with_an_allocator_of_its_own_is_asked_inside_a_region_too():
    import torch

    cudart, taken = ctypes.CDLL("libcudart.so.13"), []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
    def take(size, device, stream):
        memory = ctypes.c_void_p()
        assert cudart.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(size)) == 0
        taken.append(memory.value)
        return memory.value

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
    def give(memory, size, device, stream):
        cudart.cudaFree(ctypes.c_void_p(memory))

    functions = (ctypes.cast(each, ctypes.c_void_p).value for each in (take, give))
    allocator = torch._C._cuda_customAllocator(*functions)
    with Region("weights"):
        small = allocate(1)
    mine = torch.cuda.MemPool(allocator)
    with Region("weights"):
        with torch.cuda.use_mem_pool(mine):
            tensor = allocate(40)
    assert taken == [tensor.data_ptr()]
    assert allocated("weights") == 40 * MIB + segment_of(small)["total_size"], (allocated("weights"), segments())
    del tensor, mine


def a_graph_captured_inside_a_region_has_its_own_pool():
    import torch

    torch.zeros(1, device="cuda")
    with Region("weights"):
        before = allocate(40)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = allocate(40)
            with Region("kv_cache"):
                also = allocate(40)
        after = allocate(40)
    pool = tuple(graph.pool())
    assert pool_of(captured) == pool_of(also) == pool
    assert pool_of(before) == pool_of(after) != pool
    assert not is_expandable(captured)
    assert pool_of(allocate(40)) == DEFAULT


def end_captures_in_steps(graph):
    """Makes an earlier PyTorch's class of graphs end a capture as that of 2.14 does."""
    if not hasattr(graph, "capture_end_pre"):
        real = graph.capture_end
        graph.capture_end_pre, graph.capture_end_post = real, lambda self: None
        graph.capture_end = lambda self: (self.capture_end_pre(), self.capture_end_post())


def a_capture_that_ends_in_steps_ends_with_the_first():
    import torch

    end_captures_in_steps(torch.cuda.CUDAGraph)
    torch.zeros(1, device="cuda")
    whole, steps = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(keep_graph=True)
    with Region("weights"), torch.cuda.stream(torch.cuda.Stream()):
        before = allocate(40)
        with torch.cuda.graph(whole):
            captured = [allocate(40)]
        between = allocate(40)
        steps.capture_begin()
        captured.append(allocate(40))
        steps.capture_end_pre()
        after = allocate(40)
        steps.capture_end_post()
    assert pool_of(before) == pool_of(between) == pool_of(after) != DEFAULT
    assert [pool_of(tensor) for tensor in captured] == [tuple(whole.pool()), tuple(steps.pool())]
    assert is_expandable(allocate(40))


def what_a_capture_allocates_beside_its_pool_is_not_the_regions():
    import torch

    torch.zeros(1, device="cuda")
    with Region("weights"):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            pass
    mixed = [s for s in segments() if tuple(s["segment_pool_id"]) == DEFAULT and not s["is_expandable"]]
    assert not mixed, mixed
    assert allocated("weights") == 0


def the_first_regions_of_many_threads_are_isolated():
    sys.setswitchinterval(1e-6)
    allocate(1)
    barrier = threading.Barrier(8)
    pools = []

    def run():
        barrier.wait()
        with Region("weights"):
            pools.append(pool_of(allocate(4)))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pools) == 8 and DEFAULT not in pools, pools


def a_region_inside_a_capture_is_left_to_the_graph():
    import torch

    with Region("weights"):
        warm = allocate(4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with Region("weights"):
            captured = allocate(40)
    assert pool_of(captured) == tuple(graph.pool())
    with Region("weights"):
        assert pool_of(allocate(4)) == pool_of(warm)


def out_of_memory_in_a_region_is_pytorchs_error():
    import torch

    free, _ = torch.cuda.mem_get_info()
    with Region("weights"):
        try:
            allocate(free // MIB + 1024)
            raise AssertionError("there was memory")
        except torch.cuda.OutOfMemoryError:
            pass
        inside = allocate(40)
    assert not is_expandable(inside)
    assert is_expandable(allocate(40))


def memory_cached_outside_is_there_for_a_region():
    import torch

    total = torch.cuda.mem_get_info()[1] // MIB
    cached = [allocate(total // 8) for _ in range(6)]
    del cached
    with Region("weights"):
        inside = allocate(total // 2)
    assert not is_expandable(inside)


def an_exception_inside_a_region_leaves_it():
    for _ in range(3):
        try:
            with Region("weights"):
                allocate(4)
                raise ValueError
        except ValueError:
            pass
        outside = allocate(4)
        assert is_expandable(outside) and pool_of(outside) == DEFAULT


def half_inside_half_outside_with_settings_changing():
    import random

    import torch

    rounds = int(os.environ.get("ROUNDS", "1000"))
    allocate(1)
    stop = threading.Event()
    wrong = []

    def run(index):
        rng = random.Random(index)
        kept = []
        for _ in range(rounds):
            size = rng.choice([1000, 3 * MIB, 30 * MIB])
            if index % 2 == 0:
                with Region("weights" if index % 4 == 0 else "kv_cache"):
                    tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
            else:
                tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
            kept.append(tensor)
            if len(kept) > 8:
                kept.pop(rng.randrange(8))
        kept_by[index] = kept

    def change():
        count = 0
        while not stop.is_set():
            count += 1
            torch._C._accelerator_setAllocatorSettings(
                f"expandable_segments:True,max_split_size_mb:{100 + count % 100}"
            )
            # Each snapshot of PyTorch 2.11 loses a reference to True, and before Python 3.12 some ten
            # thousand of them end the process.
            if count % 10 != 0 or count > 20000:
                continue
            for segment in segments():
                inside = tuple(segment["segment_pool_id"]) != DEFAULT
                if segment["is_expandable"] == inside:
                    wrong.append(segment)
        changes.append(count)

    kept_by, changes = {}, []
    changer = threading.Thread(target=change)
    changer.start()
    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    changer.join()
    assert not wrong, wrong[:2]
    assert len(kept_by) == 8 and changes[0] > 1
    for index, kept in kept_by.items():
        for tensor in kept:
            assert is_expandable(tensor) == (index % 2 == 1)
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    assert settings["expandable_segments"] is True
    assert settings["max_split_size"] == (100 + changes[0] % 100) * MIB


def content_survives_a_sleep_and_expandable_memory_stays_awake():
    import torch

    content = torch.randint(0, 255, (8 * MIB,), dtype=torch.uint8)
    outside = allocate(40)
    with Region("weights"):
        inside = allocate(8)
        inside.copy_(content)
    torch.cuda.synchronize()
    address = inside.data_ptr()
    free_before, _ = torch.cuda.mem_get_info()
    assert lib.dormouse_sleep(tags("weights"), 1, 0) == 0
    free_asleep, _ = torch.cuda.mem_get_info()
    assert free_asleep - free_before >= 8 * MIB
    outside.copy_(torch.zeros(40 * MIB, dtype=torch.uint8))
    assert lib.dormouse_wake(tags("weights"), 1) == 0
    assert inside.data_ptr() == address
    assert torch.equal(inside.cpu(), content)


def free_segments_go_back_when_the_region_ends():
    import torch

    outside = allocate(300)
    outside_address = outside.data_ptr()
    del outside  # cached: it is the program's
    with Region("weights"):
        tensors = [allocate(128) for _ in range(8)]
        contents = [content_of(tensor, number) for number, tensor in enumerate(tensors)]
        before = stat("weights", "mapped")
        del tensors[::2], contents[::2]
    assert before == 1024 * MIB
    if gives_back_alone():
        assert torch.cuda.memory_reserved() == (512 + 300) * MIB
        assert allocate(300).data_ptr() == outside_address, "what the program had cached is gone"
    else:
        assert torch.cuda.memory_reserved() == (1024 + 300) * MIB
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 512 * MIB
    assert (allocated("weights"), stat("weights", "mapped")) == (512 * MIB, 512 * MIB)
    for tensor, content in zip(tensors, contents):
        assert torch.equal(tensor.cpu(), content)


def what_is_freed_later_goes_back_with_the_next_region():
    import torch

    with Region("weights"):
        first = [allocate(128) for _ in range(4)]
        del first[0]
    del first
    alone = gives_back_alone()
    assert torch.cuda.memory_reserved() == (384 if alone else 512) * MIB
    time.sleep(1.1)
    with Region("weights"):
        second = allocate(128)
        freed = allocate(128)
        del freed
    if not alone:
        assert torch.cuda.memory_reserved() == (512 + 256) * MIB
        torch.cuda.empty_cache()
    assert allocated("weights") == torch.cuda.memory_reserved() == 128 * MIB
    assert not is_expandable(second)


def regions_that_come_one_after_the_other_keep_what_is_free():
    end = time.monotonic() + 2.5
    pools = set()
    while time.monotonic() < end:
        with Region("weights"):
            tensor = allocate(100)
            pools.add(pool_of(tensor))
            del tensor
        time.sleep(0.01)
    # The first one was looked at before it was known how often they come.
    assert len(pools) <= 2, pools


def little_that_is_free_stays():
    with Region("weights"):
        kept, freed = allocate(40), allocate(40)
        del freed
    with Region("weights"):
        again = allocate(40)
    assert pool_of(again) == pool_of(kept)
    assert allocated("weights") == 80 * MIB


def the_programs_empty_cache_includes_the_regions():
    import torch

    with Region("weights"):
        tensors = [allocate(128) for _ in range(4)]
    del tensors[1:]
    outside = allocate(100)
    del outside
    torch.cuda.empty_cache()
    assert allocated("weights") == torch.cuda.memory_reserved() == 128 * MIB
    with Region("weights"):
        inside = allocate(64)
        assert not is_expandable(inside) and pool_of(inside) != DEFAULT


def empty_cache_inside_a_region_empties_the_programs_cache():
    import torch

    outside = allocate(300)
    del outside
    with Region("weights"):
        kept, freed = allocate(100), allocate(100)
        del freed
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 100 * MIB
        assert pool_of(allocate(100)) != DEFAULT
    assert not is_expandable(kept)


def free_segments_go_back_while_other_threads_are_in_pools():
    import torch

    stop = threading.Event()
    allocate(1)

    def in_a_region():
        while not stop.is_set():
            with Region("kv_cache"):
                allocate(4)

    pool = torch.cuda.MemPool()

    def in_a_pool_of_the_program():
        while not stop.is_set():
            with torch.cuda.use_mem_pool(pool):
                allocate(4)

    def capturing():
        while not stop.is_set():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                allocate(4)

    threads = [threading.Thread(target=f) for f in (in_a_region, in_a_pool_of_the_program, capturing)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        with Region("weights"):
            tensors = [allocate(128) for _ in range(4)]
            del tensors[1:]
        if not gives_back_alone():
            torch.cuda.empty_cache()
        assert allocated("weights") == 128 * MIB
        del tensors
        time.sleep(1.1)
    stop.set()
    for thread in threads:
        thread.join()


def a_pool_of_the_program_can_be_dropped_while_a_thread_is_in_a_region():
    import torch

    inside, leave = threading.Event(), threading.Event()

    def in_a_region():
        with Region("weights"):
            allocate(4)
            inside.set()
            leave.wait()

    allocate(1)
    thread = threading.Thread(target=in_a_region)
    thread.start()
    inside.wait()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        allocate(40)
    pool_id = pool.id
    del pool
    assert reserved(tuple(pool_id)) == 40 * MIB
    leave.set()
    thread.join()
    assert reserved(tuple(pool_id)) == 0


def looks_at_pools_cost_no_reference():
    import torch

    if sys.version_info >= (3, 12):
        return  # True and False are not counted
    before = sys.getrefcount(True), sys.getrefcount(False)
    for _ in range(300):  # numbers of pools beyond 256 are objects of their own
        with Region("weights"):
            tensors = [allocate(64), allocate(64)]
            del tensors
        torch.cuda.empty_cache()  # looks at all pools
    after = sys.getrefcount(True), sys.getrefcount(False)
    assert after[0] >= before[0] and after[1] >= before[1], (before, after)


def tags(name):
    return (ctypes.c_char_p * 1)(name.encode())


def what_is_free_in_a_pool_is_not_backed_up(library=lib):
    import torch

    sleep = library.dormouse_sleep
    with Region("weights"):
        kept = [allocate(40), allocate(3), allocate(3)]  # the small ones share a segment of 20 MiB
        contents = [content_of(tensor, number) for number, tensor in enumerate(kept)]
        freed = [allocate(40), allocate(3)]
        for tensor in freed:
            content_of(tensor, 9)
        del freed, tensor
    assert allocated("weights") == 100 * MIB  # too little to be given back
    assert sleep(tags("weights"), 1, 0) == 0
    assert stat("weights", "backed_up") == 46 * MIB
    assert lib.dormouse_wake(tags("weights"), 1) == 0
    for tensor, content in zip(kept, contents):
        assert torch.equal(tensor.cpu(), content)
    # In use again, it is backed up.
    with Region("weights"):
        again = allocate(40)
        content = content_of(again, 10)
    assert sleep(tags("weights"), 1, 0) == 0
    assert stat("weights", "backed_up") == 86 * MIB
    assert lib.dormouse_wake(tags("weights"), 1) == 0
    assert torch.equal(again.cpu(), content)


def a_caller_that_holds_the_gil_may_put_to_sleep():
    what_is_free_in_a_pool_is_not_backed_up(ctypes.PyDLL(None))


def what_is_free_in_a_pool_that_was_given_up_is_not_backed_up():
    import torch

    with Region("weights"):
        tensors = [allocate(100) for _ in range(4)]
        content = content_of(tensors[3], 3)
        del tensors[:2]
    assert allocated("weights") == (200 if gives_back_alone() else 400) * MIB
    del tensors[0]
    assert lib.dormouse_sleep(tags("weights"), 1, 0) == 0
    assert stat("weights", "backed_up") == 100 * MIB
    assert lib.dormouse_wake(tags("weights"), 1) == 0
    assert torch.equal(tensors[0].cpu(), content)


def a_sleep_from_outside_has_pytorch_give_back_what_it_caches():
    import torch

    with Region("weights"):
        kept = allocate(40)
    outside = [allocate(40), allocate(200)]
    content = content_of(outside[0], 5)
    del outside[1]
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    assert cached >= 200 * MIB
    assert lib.dormouse_sleep(None, 0, 0) == 0  # the program's own
    assert lib.dormouse_wake(None, 0) == 0
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() == cached
    assert lib.dormouse_sleep(None, 0, 2) == 0  # DORMOUSE_SLEEP_GATE, as from outside
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < 64 * MIB
    assert lib.dormouse_wake(None, 0) == 0
    assert torch.equal(outside[0].cpu(), content)
    del kept


def nothing_is_lost_by_sleeps_while_threads_allocate_in_regions():
    import random

    import torch

    stop, wrong = threading.Event(), []
    allocate(1)

    def run(index):
        rng, kept, number = random.Random(index), [], index
        while not stop.is_set():
            number += 8
            with Region(rng.choice(["weights", "kv_cache"])):
                tensor = allocate(rng.choice([1, 3, 12]))
                kept.append((tensor, content_of(tensor, number)))
            tensor, content = rng.choice(kept)
            if not torch.equal(tensor.cpu(), content):
                wrong.append(number)
                return
            if len(kept) > 6:
                kept.pop(rng.randrange(6))
            del tensor, content

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    sleeps = int(os.environ.get("ROUNDS", "12"))
    for _ in range(sleeps):
        assert lib.dormouse_sleep(None, 0, 2) == 0  # DORMOUSE_SLEEP_GATE
        assert lib.dormouse_wake(None, 0) == 0
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


SLEEP_FROM_OUTSIDE = """
import http.client, os, socket, sys, time
connection = http.client.HTTPConnection("localhost", timeout=60)
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(sys.argv[1])
sys.stdin.readline()
time.sleep(0.3)
began = time.monotonic()
connection.request("POST", "/sleep?tags=weights")
assert connection.getresponse().status == 200
print(time.monotonic() - began)
"""


def a_sleep_from_outside_does_not_wait_for_who_holds_the_gil():
    with Region("weights"):
        tensors = [allocate(40), allocate(40)]
        content_of(tensors[1], 5)
        del tensors[0]
    socket = os.path.join(os.environ["DORMOUSE_SOCKET_DIR"], f"{os.getpid()}.sock")
    outside = subprocess.Popen(
        [sys.executable, "-c", SLEEP_FROM_OUTSIDE, socket],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        text=True,
    )
    outside.stdin.write("go\n")
    outside.stdin.flush()
    ctypes.PyDLL(None).usleep(3000000)
    seconds = float(outside.communicate(timeout=60)[0])
    assert seconds < 2, seconds
    assert stat("weights", "backed_up") >= 40 * MIB
    assert lib.dormouse_wake(tags("weights"), 1) == 0


def set_thread_name(name, library=None):
    """As programs do: Python's own call holds the GIL, C++ threads do not."""
    library = library or ctypes.PyDLL(None)
    library.pthread_self.restype = ctypes.c_void_p
    assert library.pthread_setname_np(ctypes.c_void_p(library.pthread_self()), name.encode()) == 0


def a_thread_whose_name_fits_is_in_a_region_for_its_life():
    pools = []

    def load():
        before = allocate(40)
        set_thread_name("loader 1")
        inside = allocate(40)
        with Region(None):
            excluded = allocate(40)
        with Region("kv_cache"):
            other = allocate(40)
        again = allocate(40)
        assert is_expandable(before) and is_expandable(excluded) and not is_expandable(other)
        assert not is_expandable(inside) and not is_expandable(again)
        assert pool_of(inside) == pool_of(again) != DEFAULT
        assert allocated("weights") == 80 * MIB and allocated("kv_cache") == 40 * MIB
        pools.append(pool_of(inside))

    for _ in range(3):
        on_thread(load)
        assert is_expandable(allocate(40))
    assert len(set(pools)) == 1, pools
    outside = on_thread(lambda: allocate(40))
    assert is_expandable(outside) and pool_of(outside) == DEFAULT


END_WITH_THREADS = """
import ctypes, threading, torch

def load():
    library = ctypes.PyDLL(None)
    library.pthread_self.restype = ctypes.c_void_p
    library.pthread_setname_np(ctypes.c_void_p(library.pthread_self()), b"loader 1")
    torch.empty(4 << 20, dtype=torch.uint8, device="cuda")

torch.empty(1, device="cuda")
threads = [threading.Thread(target=load, daemon=True) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()  # not their very ends, at which they leave their regions
"""


def the_interpreter_may_end_while_threads_leave_their_regions():
    for _ in range(4):
        subprocess.run([sys.executable, "-c", END_WITH_THREADS], check=True, timeout=100)


def a_thread_that_gets_its_name_without_the_gil_is_suspended():
    def load():
        set_thread_name("loader 1", ctypes.CDLL(None))
        return allocate(40)

    inside = on_thread(load)
    assert not is_expandable(inside) and pool_of(inside) == DEFAULT
    assert allocated("weights") == 40 * MIB


def a_native_thread_waits_for_nobody_who_keeps_the_gil():
    allocate(1)
    keeps_gil, thread = ctypes.PyDLL(None), ctypes.c_ulong()
    begin = ctypes.cast(lib.dormouse_region_begin, ctypes.c_void_p)
    for _ in range(3):
        assert keeps_gil.pthread_create(ctypes.byref(thread), None, begin, b"weights") == 0
        assert keeps_gil.pthread_join(thread, None) == 0  # and it ended inside its region
    with Region("weights"):
        inside = allocate(40)
    assert pool_of(inside) != DEFAULT and is_expandable(allocate(40))


def switched_off_pytorch_is_left_alone():
    with Region("weights"):
        inside = allocate(40)
    assert is_expandable(inside) and pool_of(inside) == DEFAULT


LOADERS = {"DORMOUSE_REGIONS": "weights: thread(loader*)"}
LATE_KEYS = {
    "DORMOUSE_REGIONS": "weights{pinned_max_cached_size_mb:8,max_split_size_mb:300}: api; "
    "kv_cache{pinned_max_round_threshold_mb:8}: api"
}
LATE_KEYS_OF_ALL = {
    "DORMOUSE_REGIONS": "weights{pinned_max_cached_size_mb:8,max_split_size_mb:300}: process"
}
BACKGROUND_THREAD = {"DORMOUSE_REGIONS": "weights{pinned_use_background_threads:True}: api"}
PINNED_SIZES = {
    "DORMOUSE_REGIONS": "weights{pinned_max_round_threshold_mb:4,pinned_max_cached_size_mb:16}: api"
}
NOTHING_RETAINED = {"DORMOUSE_RETAIN": "0"}

CASES = {
    function: environment
    for function, environment in (
        (only_the_threads_region_is_suspended, {}),
        (all_other_settings_read_the_same, {}),
        (settings_that_this_pytorch_cannot_have_in_a_region_are_left_out_alone, LATE_KEYS),
        (settings_that_this_pytorch_cannot_have_for_the_process_are_left_out_alone, LATE_KEYS_OF_ALL),
        (a_program_that_does_not_use_cuda_hears_nothing_of_settings, LATE_KEYS),
        (pinned_memory_in_a_region_starts_the_background_thread, BACKGROUND_THREAD),
        (pinned_memory_follows_the_region_of_who_allocates_and_frees, PINNED_SIZES),
        (no_cached_block_crosses_the_border, {}),
        (an_allocator_without_pools_is_named, {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}),
        (the_innermost_region_decides, {}),
        (a_region_may_begin_before_torch_is_imported, {}),
        (a_region_may_begin_before_cuda_is_initialised, {}),
        (a_region_may_end_before_cuda_is_initialised, {}),
        (threads_inside_one_tag_at_once_have_their_own_pools, {}),
        (a_tag_keeps_its_pool, {}),
        (a_thread_that_ends_inside_a_region_gives_its_pool_back, {}),
        (each_device_has_a_pool_of_the_tag, {}),
        (the_programs_own_pools_work_in_and_around_regions, {}),
        (a_pool_of_the_program_does_not_carry_memory_across_a_regions_border, {"DORMOUSE_REGIONS": "kv_cache=none: api"}),
        (a_pool_with_an_allocator_of_its_own_is_asked_inside_a_region_too, {}),
        (a_graph_captured_inside_a_region_has_its_own_pool, {}),
        (a_capture_that_ends_in_steps_ends_with_the_first, {}),
        (what_a_capture_allocates_beside_its_pool_is_not_the_regions, {}),
        (the_first_regions_of_many_threads_are_isolated, {}),
        (a_region_inside_a_capture_is_left_to_the_graph, {}),
        (out_of_memory_in_a_region_is_pytorchs_error, {}),
        (memory_cached_outside_is_there_for_a_region, {}),
        (an_exception_inside_a_region_leaves_it, {}),
        (half_inside_half_outside_with_settings_changing, {}),
        (content_survives_a_sleep_and_expandable_memory_stays_awake, {}),
        (free_segments_go_back_when_the_region_ends, NOTHING_RETAINED),
        (what_is_freed_later_goes_back_with_the_next_region, {}),
        (regions_that_come_one_after_the_other_keep_what_is_free, {}),
        (little_that_is_free_stays, {}),
        (the_programs_empty_cache_includes_the_regions, {}),
        (empty_cache_inside_a_region_empties_the_programs_cache, {}),
        (free_segments_go_back_while_other_threads_are_in_pools, {}),
        (a_pool_of_the_program_can_be_dropped_while_a_thread_is_in_a_region, {}),
        (looks_at_pools_cost_no_reference, {}),
        (what_is_free_in_a_pool_is_not_backed_up, {}),
        (a_caller_that_holds_the_gil_may_put_to_sleep, {}),
        (what_is_free_in_a_pool_that_was_given_up_is_not_backed_up, {}),
        (a_sleep_from_outside_has_pytorch_give_back_what_it_caches, {}),
        (nothing_is_lost_by_sleeps_while_threads_allocate_in_regions, {}),
        (a_sleep_from_outside_does_not_wait_for_who_holds_the_gil, {}),
        (a_thread_whose_name_fits_is_in_a_region_for_its_life, LOADERS),
        (the_interpreter_may_end_while_threads_leave_their_regions, LOADERS),
        (a_thread_that_gets_its_name_without_the_gil_is_suspended, LOADERS),
        (a_native_thread_waits_for_nobody_who_keeps_the_gil, {}),
        (switched_off_pytorch_is_left_alone, {"DORMOUSE_TORCH": "off"}),
    )
}


class Cuda(unittest.TestCase):
    """One test a case."""


def inherited():
    """What the test itself is told is no option of the library."""
    return {k: v for k, v in os.environ.items() if not k.startswith("DORMOUSE_TEST_")}


def says_what_it_should(output):
    """The library said once each what the case announced, and nothing else."""
    lines = output.splitlines()
    expected = [line.removeprefix(TO_BE_SAID) for line in lines if line.startswith(TO_BE_SAID)]
    said = [line for line in lines if re.search(r"dormouse\[\d+\]", line)]
    return len(said) == len(expected) and all(sum(text in line for line in said) == 1 for text in expected)


def add_test(function, environment):
    def test(self):
        with tempfile.TemporaryDirectory(prefix="dormouse-") as sockets:
            done = subprocess.run(
                [sys.executable, __file__, function.__name__],
                env={**inherited(), **EXPANDABLE, "DORMOUSE_SOCKET_DIR": sockets, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
            )
        if done.returncode == 77:
            self.skipTest(done.stdout.strip())
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertTrue(says_what_it_should(done.stdout), "the library is to say, or not: " + done.stdout)

    setattr(Cuda, f"test_{function.__name__}", test)


for each, its_environment in CASES.items():
    add_test(each, its_environment)

if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in {function.__name__ for function in CASES}:
        globals()[sys.argv[1]]()
    else:
        unittest.main()
