"""What Dormouse does with the GIL: regions of threads that cannot have it, since an extension keeps it and
waits for them, and threads that wait at the gate. Run by run.sh with the case's name and the extension
(extension.cc)."""

import ctypes
import os
import signal
import sys
import threading
import time

KEEPS_GIL, GIVES_GIL_BACK = ctypes.PyDLL, ctypes.CDLL
lib = ctypes.CDLL(None)


def asleep_with_closed_gate(library):
    """Memory that sleeps as if someone outside had asked for it; how to write to it."""
    cuda = library("libcudart.so.13")
    memory = ctypes.c_void_p()
    assert lib.dormouse_region_begin(b"weights") == 0
    assert cuda.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(1 << 20)) == 0
    assert lib.dormouse_region_end() == 0
    assert lib.dormouse_sleep(None, 0, 2) == 0  # DORMOUSE_SLEEP_GATE
    return lambda: cuda.cudaMemset(memory, 1, ctypes.c_size_t(1 << 20))


def threads_of_an_extension_that_keeps_the_gil(path):
    assert ctypes.PyDLL(path).load_in_threads() == 1


def a_thread_that_gave_the_gil_back(path):
    kept, begun, results = ctypes.c_int(), ctypes.c_int(), []
    flags = ctypes.byref(kept), ctypes.byref(begun)
    thread = threading.Thread(
        target=lambda: results.append(ctypes.CDLL(path).region_while_it_is_kept(*flags))
    )
    thread.start()
    ctypes.PyDLL(path).keep_gil(*flags)
    thread.join()
    assert results == [1]


def a_thread_that_waits_at_the_gate_gives_the_gil_back(_):
    write = asleep_with_closed_gate(KEEPS_GIL)
    ticks = []

    def others():
        for _ in range(20):
            time.sleep(0.01)
            ticks.append(1)
        assert lib.dormouse_wake(None, 0) == 0

    thread = threading.Thread(target=others)
    thread.start()
    assert write() == 0
    assert len(ticks) == 20
    thread.join()


def handlers_of_signals_run_at_the_gate(_):
    for library in (KEEPS_GIL, GIVES_GIL_BACK):
        write = asleep_with_closed_gate(library)
        seen, done = [], threading.Event()
        signal.signal(signal.SIGUSR1, lambda *_: (seen.append(1), done.set()))

        def others():
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGUSR1)
            done.wait(10)
            seen.append(2)
            assert lib.dormouse_wake(None, 0) == 0

        thread = threading.Thread(target=others)
        thread.start()
        assert write() == 0
        thread.join()
        assert seen == [1, 2], (library, seen)


def a_handler_that_raises_ends_the_wait(_):
    for library in (KEEPS_GIL, GIVES_GIL_BACK):
        write = asleep_with_closed_gate(library)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        results = []
        try:
            results.append(write())
            results.append(0)  # not reached
        except SystemExit as error:
            results.append(error.code)
        assert results[-1] == 7 and 0 not in results, results
        assert lib.dormouse_wake(None, 0) == 0
        assert write() == 0


def a_thread_at_the_gate_does_not_keep_the_process_from_its_end(_):
    write = asleep_with_closed_gate(KEEPS_GIL)
    for _ in range(4):
        threading.Thread(target=write, daemon=True).start()
    time.sleep(0.3)
    sys.exit(0)


globals()[sys.argv[1]](sys.argv[2])
