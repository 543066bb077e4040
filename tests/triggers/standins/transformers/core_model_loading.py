"""A loader that hands tensors to other threads."""

from concurrent.futures import ThreadPoolExecutor


def load_all(makers):
    thread_pool = ThreadPoolExecutor(max_workers=4)
    try:
        if thread_pool is not None:
            return [each.result() for each in [thread_pool.submit(make) for make in makers]]
        return [make() for make in makers]
    finally:
        if thread_pool is not None:
            thread_pool.shutdown()
