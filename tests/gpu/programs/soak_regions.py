"""Functions that segments_soak.py names in rules: what is allocated while one of them runs lies inside a region."""
import contextlib


def load(work):
    return work()


def parts(work):
    while True:
        yield work()


@contextlib.contextmanager
def loading(work):
    work()
    yield
    work()
