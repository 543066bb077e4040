"""torch_memory_saver's functions under the preloaded library, through the package's own
BinaryWrapper and configure_subprocess rules, on the simulated driver or a real one.

Started by run.sh: TMS_PACKAGE names a folder with the unpacked package (its compiled libraries are
used in the cases of Beside alone), LD_PRELOAD this library under a name with torch_memory_saver in it. Each case
runs in a process of its own. Memory is allocated through cudaMalloc.
"""

import ctypes
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import unittest

MIB = 1 << 20
cuda = None


def load_module(name):
    """A module of the package without the package's __init__, which imports torch and numpy."""
    path = pathlib.Path(os.environ["TMS_PACKAGE"]) / "torch_memory_saver" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tms_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_wrapper():
    """As HookUtilModePreload finds the library."""
    paths = [p for p in os.environ["LD_PRELOAD"].split(":") if "torch_memory_saver" in p]
    assert len(paths) == 1, paths
    return load_module("binary_wrapper").BinaryWrapper(paths[0])


def malloc(size):
    pointer = ctypes.c_void_p()
    result = cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size))
    assert result == 0, result
    return pointer


def write(pointer, data):
    assert cuda.cudaMemcpy(pointer, data, ctypes.c_size_t(len(data)), 1) == 0


def read(pointer, size):
    buffer = ctypes.create_string_buffer(size)
    assert cuda.cudaMemcpy(buffer, pointer, ctypes.c_size_t(size), 2) == 0
    return buffer.raw


def free_memory():
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value


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


HOST, NONE, DISK = 0, 1, 2


def all_stats():
    stats, count = (TagStats * 64)(), ctypes.c_size_t()
    stats[0].size = ctypes.sizeof(TagStats)
    assert ctypes.CDLL(None).dormouse_stats(stats, 64, ctypes.byref(count)) == 0
    return stats[: count.value]


def allocated():
    """Bytes by (tag, policy)."""
    return {(s.tag.decode(), s.backup): s.allocated for s in all_stats() if s.allocated}


def backed_up(tag):
    """Bytes of host memory that its backups hold."""
    return sum(s.backed_up for s in all_stats() if s.tag.decode() == tag)


class region:
    """What the package's region() does to the thread's state."""

    def __init__(self, wrapper, tag, cpu=False, disk=False):
        self.wrapper, self.tag, self.cpu, self.disk = wrapper, tag, cpu, disk

    def __enter__(self):
        cdll = self.wrapper.cdll
        self.before = dict(
            tag=cdll.tms_get_current_tag().decode(),
            interesting_region=cdll.tms_get_interesting_region(),
            enable_cpu_backup=cdll.tms_get_enable_cpu_backup(),
            cpu_backup_backend=cdll.tms_get_cpu_backup_backend().decode(),
            enable_disk_backup=cdll.tms_get_enable_disk_backup(),
        )
        self.wrapper.set_config(
            tag=self.tag,
            interesting_region=True,
            enable_cpu_backup=self.cpu,
            enable_disk_backup=self.disk,
        )

    def __exit__(self, *_):
        cdll = self.wrapper.cdll
        assert cdll.tms_get_interesting_region()
        assert cdll.tms_get_enable_cpu_backup() == self.cpu
        assert cdll.tms_get_current_tag().decode() == self.tag
        self.wrapper.set_config(**self.before)


# --- The cases


def a_region_gives_memory_its_tag_and_policy():
    wrapper = open_wrapper()
    outside = malloc(2 * MIB)
    with region(wrapper, "weights", cpu=True):
        malloc(4 * MIB)
    with region(wrapper, "kv_cache"):
        malloc(8 * MIB)
        with region(wrapper, "inner", cpu=True):
            malloc(2 * MIB)
        malloc(16 * MIB)
    malloc(2 * MIB)
    assert allocated() == {
        ("weights", HOST): 4 * MIB,
        ("kv_cache", NONE): 24 * MIB,
        ("inner", HOST): 2 * MIB,
    }, allocated()
    assert not wrapper.cdll.tms_get_interesting_region()
    assert outside


def pause_gives_memory_back_and_resume_restores_it():
    wrapper = open_wrapper()
    data = os.urandom(4 * MIB)
    with region(wrapper, "weights", cpu=True):
        kept = malloc(4 * MIB)
    with region(wrapper, "kv_cache"):
        dropped = malloc(4 * MIB)
    write(kept, data)
    write(dropped, data)
    before = free_memory()
    assert wrapper.cdll.tms_pause(b"weights") == 0
    assert free_memory() - before >= 4 * MIB
    assert read(dropped, 16) == data[:16]
    assert wrapper.cdll.tms_pause(None) == 0
    assert free_memory() - before >= 8 * MIB
    assert wrapper.cdll.tms_resume(None) == 0
    assert read(kept, len(data)) == data
    assert read(dropped, 4 * MIB) == bytes(4 * MIB)


def what_ends_the_process_there_is_harmless_here():
    cdll = open_wrapper().cdll
    assert cdll.tms_pause(b"nobody") == 0
    assert cdll.tms_resume(b"nobody") == 0
    with region(open_wrapper(), "weights", cpu=True):
        malloc(MIB)
    for _ in range(2):
        assert cdll.tms_pause(b"weights") == 0
    for _ in range(2):
        assert cdll.tms_resume(b"weights") == 0
    cdll.tms_set_current_tag(None)
    cdll.tms_set_cpu_backup_backend(b"tape")
    assert cdll.tms_get_cpu_backup_backend() == b"pinned"
    cdll.tms_set_disk_backup_dir(None)


def the_state_is_the_threads():
    wrapper = open_wrapper()
    with region(wrapper, "weights", cpu=True):
        seen = []

        def look():
            cdll = wrapper.cdll
            seen.append((cdll.tms_get_interesting_region(), cdll.tms_get_current_tag()))
            malloc(2 * MIB)

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert seen == [(False, b"default")]
    assert allocated() == {}


def the_state_is_no_stack():
    cdll = open_wrapper().cdll
    cdll.tms_set_interesting_region(True)
    cdll.tms_set_interesting_region(True)
    cdll.tms_set_current_tag(b"a")
    malloc(2 * MIB)
    cdll.tms_set_current_tag(b"b")
    malloc(4 * MIB)
    cdll.tms_set_enable_cpu_backup(True)
    malloc(8 * MIB)
    cdll.tms_set_interesting_region(False)
    malloc(16 * MIB)
    cdll.tms_set_current_tag(b"c")
    malloc(16 * MIB)
    cdll.tms_set_interesting_region(True)
    malloc(32 * MIB)
    assert allocated() == {
        ("a", NONE): 2 * MIB,
        ("b", NONE): 4 * MIB,
        ("b", HOST): 8 * MIB,
        ("c", HOST): 32 * MIB,
    }, allocated()


def regions_of_others_may_lie_across():
    cdll = open_wrapper().cdll
    dormouse = ctypes.CDLL(None)
    cdll.tms_set_interesting_region(True)
    assert dormouse.dormouse_region_begin(b"own") == 0
    cdll.tms_set_interesting_region(False)
    malloc(2 * MIB)
    assert dormouse.dormouse_region_end() == 0
    malloc(4 * MIB)
    assert allocated() == {("own", HOST): 2 * MIB}, allocated()


def any_text_is_a_tag():
    wrapper = open_wrapper()
    with region(wrapper, "größe 1", cpu=True):
        malloc(2 * MIB)
    with region(wrapper, "", cpu=True):
        malloc(2 * MIB)
    assert sum(allocated().values()) == 4 * MIB
    before = free_memory()
    assert wrapper.cdll.tms_pause("größe 1".encode()) == 0
    assert free_memory() - before >= 2 * MIB


def the_backup_of_paused_memory_can_be_read():
    wrapper = open_wrapper()
    data = os.urandom(MIB)
    with region(wrapper, "weights", cpu=True):
        memory = malloc(MIB)
    write(memory, data)
    get = wrapper.cdll.tms_get_cpu_backup_pointer
    as_bytes = ctypes.cast(memory, ctypes.POINTER(ctypes.c_uint8))
    assert not get(as_bytes, MIB)
    assert wrapper.cdll.tms_pause(None) == 0
    copy = get(as_bytes, MIB)
    assert ctypes.string_at(copy, MIB) == data
    assert not get(as_bytes, 64 * MIB)


def a_retained_backup_can_be_read_after_resume():
    wrapper = open_wrapper()
    wrapper.cdll.tms_set_retain_cpu_backup(True)
    get = wrapper.cdll.tms_get_cpu_backup_pointer
    data = os.urandom(MIB)
    with region(wrapper, "weights", cpu=True):
        memory, later = malloc(MIB), malloc(MIB)
    write(memory, data)
    as_bytes, as_bytes_later = (ctypes.cast(p, ctypes.POINTER(ctypes.c_uint8)) for p in (memory, later))
    for _ in range(2):
        assert wrapper.cdll.tms_pause(None) == 0
        paused = ctypes.addressof(get(as_bytes, MIB).contents)
        assert wrapper.cdll.tms_resume(None) == 0
        copy = get(as_bytes, MIB)
        assert ctypes.addressof(copy.contents) == paused
        assert ctypes.string_at(copy, MIB) == data
    # Memory that was freed has no backup, nor has what came in its place.
    assert cuda.cudaFree(later) == 0
    with region(wrapper, "weights", cpu=True):
        assert any(malloc(MIB).value == later.value for _ in range(64))
    assert get(as_bytes, MIB) and not get(as_bytes_later, MIB)


def host_memory_goes_back_after_resume_unless_retained():
    wrapper = open_wrapper()
    with region(wrapper, "weights", cpu=True):
        memory = malloc(32 * MIB)
    write(memory, os.urandom(32 * MIB))
    assert wrapper.cdll.tms_get_retain_cpu_backup() is False
    for retained in (False, True, False):
        wrapper.cdll.tms_set_retain_cpu_backup(retained)
        assert wrapper.cdll.tms_pause(None) == 0
        assert backed_up("weights") == 32 * MIB
        assert wrapper.cdll.tms_resume(None) == 0
        assert backed_up("weights") == (32 * MIB if retained else 0)


def the_users_own_choice_holds_where_the_program_says_nothing():
    wrapper = open_wrapper()
    with region(wrapper, "weights", cpu=True):
        write(malloc(32 * MIB), os.urandom(32 * MIB))
    assert wrapper.cdll.tms_get_retain_cpu_backup() is True
    assert wrapper.cdll.tms_pause(None) == 0 and wrapper.cdll.tms_resume(None) == 0
    assert backed_up("weights") == 32 * MIB


def retaining_is_remembered():
    cdll = open_wrapper().cdll
    assert cdll.tms_get_retain_cpu_backup() is False
    cdll.tms_set_retain_cpu_backup(True)
    assert cdll.tms_get_retain_cpu_backup() is True
    cdll.tms_set_retain_cpu_backup(False)
    with region(open_wrapper(), "weights", cpu=True):
        memory = malloc(MIB)
    write(memory, b"x" * MIB)
    for _ in range(3):
        assert cdll.tms_pause(None) == 0
        assert cdll.tms_resume(None) == 0
        assert read(memory, MIB) == b"x" * MIB


def the_environment_makes_the_whole_process_interesting():
    cdll = open_wrapper().cdll
    assert cdll.tms_get_interesting_region() and cdll.tms_get_enable_cpu_backup()
    malloc(2 * MIB)
    thread = threading.Thread(target=lambda: malloc(4 * MIB))
    thread.start()
    thread.join()
    cdll.tms_set_interesting_region(False)
    malloc(8 * MIB)
    cdll.tms_set_interesting_region(True)
    cdll.tms_set_current_tag(b"weights")
    malloc(16 * MIB)
    assert allocated() == {("default", HOST): 6 * MIB, ("weights", HOST): 16 * MIB}, allocated()


def the_environment_is_read_as_there():
    cdll = open_wrapper().cdll
    assert not cdll.tms_get_interesting_region()
    assert not cdll.tms_get_enable_cpu_backup()
    assert cdll.tms_get_cpu_backup_backend() == b"mmap"
    assert cdll.tms_get_retain_cpu_backup() is True


def the_oldest_versions_functions_work():
    cdll = open_wrapper().cdll
    cdll.tms_set_current_tag(b"weights")
    cdll.tms_region_enter()
    malloc(2 * MIB)
    cdll.tms_set_current_tag(b"default")
    cdll.tms_region_leave()
    malloc(4 * MIB)
    assert allocated() == {("weights", NONE): 2 * MIB}, allocated()


def a_backup_can_go_to_disk():
    wrapper = open_wrapper()
    data = os.urandom(4 * MIB)
    with region(wrapper, "weights", disk=True):
        memory = malloc(4 * MIB)
    write(memory, data)
    assert allocated() == {("weights", DISK): 4 * MIB}, allocated()
    assert wrapper.cdll.tms_pause(None) == 0
    assert wrapper.cdll.tms_resume(None) == 0
    assert read(memory, len(data)) == data


def the_directory_may_be_named_after_cuda_has_started():
    wrapper = open_wrapper()
    data = os.urandom(4 * MIB)
    assert malloc(MIB)
    pieces = []
    for name in ("first", "second"):
        folder = os.path.join(os.environ["FOLDER"], name)
        os.makedirs(folder, mode=0o700)
        wrapper.cdll.tms_set_disk_backup_dir(folder.encode())
        with region(wrapper, name, disk=True):
            pieces.append(malloc(4 * MIB))
        write(pieces[-1], data)
        assert wrapper.cdll.tms_pause(name.encode()) == 0
        assert os.listdir(folder)
    assert allocated() == {("first", DISK): 4 * MIB, ("second", DISK): 4 * MIB}, allocated()
    assert wrapper.cdll.tms_resume(None) == 0
    for piece in pieces:
        assert read(piece, len(data)) == data


def a_margin_of_memory_can_be_kept_free():
    wrapper = open_wrapper()
    wrapper.cdll.set_memory_margin_bytes(free_memory() - 8 * MIB)
    with region(wrapper, "weights", cpu=True):
        malloc(4 * MIB)
        pointer = ctypes.c_void_p()
        assert cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(16 * MIB)) == 2
    malloc(16 * MIB)
    wrapper.cdll.set_memory_margin_bytes(0)
    with region(wrapper, "weights", cpu=True):
        malloc(16 * MIB)


def the_packages_own_library_works_beside_this_one():
    wrapper = load_module("binary_wrapper").BinaryWrapper(os.environ["PACKAGES_OWN"])
    outside, content = malloc(16 * MIB), b"outside!" * (2 * MIB)
    write(outside, content)
    with region(wrapper, "kv", cpu=True):
        inside = malloc(32 * MIB)
    write(inside, content)
    before = free_memory()
    assert wrapper.cdll.tms_pause(b"kv") == 0
    assert free_memory() - before >= 32 * MIB
    assert wrapper.cdll.tms_resume(b"kv") == 0
    assert read(inside, len(content)) == read(outside, len(content)) == content
    for pointer in (inside, outside):
        assert cuda.cudaFree(pointer) == 0


# Backups on disk want a folder that nobody else can write to.
disk = tempfile.TemporaryDirectory()

# Case, environment, and whether the library may say something.
CASES = [
    (a_region_gives_memory_its_tag_and_policy, {}, False),
    (pause_gives_memory_back_and_resume_restores_it, {}, False),
    (what_ends_the_process_there_is_harmless_here, {}, True),
    (the_state_is_the_threads, {}, False),
    (the_state_is_no_stack, {}, False),
    (regions_of_others_may_lie_across, {}, False),
    (any_text_is_a_tag, {}, False),
    (the_backup_of_paused_memory_can_be_read, {}, False),
    (a_retained_backup_can_be_read_after_resume, {}, False),
    (host_memory_goes_back_after_resume_unless_retained, {}, False),
    (the_users_own_choice_holds_where_the_program_says_nothing, {"DORMOUSE_KEEP_BACKUP": "always"}, False),
    (retaining_is_remembered, {}, False),
    (
        the_environment_makes_the_whole_process_interesting,
        {"TMS_INIT_ENABLE": "1", "TMS_INIT_ENABLE_CPU_BACKUP": "true"},
        False,
    ),
    (
        the_environment_is_read_as_there,
        {
            "TMS_INIT_ENABLE": "no",
            "TMS_INIT_ENABLE_CPU_BACKUP": "maybe",
            "TMS_INIT_CPU_BACKUP_BACKEND": "mmap",
            "TMS_RETAIN_CPU_BACKUP": "YES",
        },
        True,
    ),
    (the_oldest_versions_functions_work, {}, False),
    (a_margin_of_memory_can_be_kept_free, {}, False),
    (the_directory_may_be_named_after_cuda_has_started, {"FOLDER": disk.name}, False),
    (a_backup_can_go_to_disk, {"TMS_DISK_BACKUP_DIR": disk.name}, False),
]


class Package(unittest.TestCase):
    """One test a case."""


def inherited():
    """What the test itself is told is no option of the library."""
    return {k: v for k, v in os.environ.items() if not k.startswith("DORMOUSE_TEST_")}


def add_test(function, environment, may_speak):
    def test(self):
        done = subprocess.run(
            [sys.executable, __file__, function.__name__],
            env={**inherited(), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        self.assertEqual(done.returncode, 0, done.stdout)
        if not may_speak:
            self.assertEqual(done.stdout, "")

    setattr(Package, f"test_{function.__name__}", test)


for case in CASES:
    add_test(*case)


def packages_own():
    """Its compiled library for the runtime of the tests."""
    return os.path.join(os.environ["TMS_PACKAGE"], "torch_memory_saver_hook_mode_preload_cu13.abi3.so")


class Beside(unittest.TestCase):
    """The package's own library is preloaded too, as configure_subprocess() does, in front or behind."""

    def run_beside(self, *, in_front, **environment):
        order = [packages_own(), os.environ["LD_PRELOAD"]]
        done = subprocess.run(
            [sys.executable, __file__, the_packages_own_library_works_beside_this_one.__name__],
            env={
                **inherited(),
                **environment,
                "LD_PRELOAD": ":".join(order if in_front else reversed(order)),
                "PACKAGES_OWN": packages_own(),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        self.assertEqual(done.returncode, 0, done.stdout)


for name, variables in (
    ("without_rules", {}),
    ("with_a_rule_for_the_process", {"DORMOUSE_REGIONS": "all: process"}),
    ("switched_off", {"DORMOUSE": "off"}),
):
    for place in (True, False):
        setattr(
            Beside,
            f"test_{'in_front' if place else 'behind'}_{name}",
            lambda self, place=place, variables=variables: self.run_beside(in_front=place, **variables),
        )

if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in {case[0].__name__ for case in CASES}:
        cuda = ctypes.CDLL("libcudart.so.13")
        globals()[sys.argv[1]]()
    elif sys.argv[1:] == [the_packages_own_library_works_beside_this_one.__name__]:
        cuda = ctypes.CDLL(None)  # as a program that is linked against the runtime
        the_packages_own_library_works_beside_this_one()
    else:
        unittest.main()
