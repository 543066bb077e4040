"""Regions of threads that cannot have the GIL: an extension keeps it and waits for them. Run by run.sh with
the case's name and the extension (extension.cc)."""

import ctypes
import sys
import threading


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


globals()[sys.argv[1]](sys.argv[2])
