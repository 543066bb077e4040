"""A function of every form, each of which tells what tag it runs under."""

import asyncio
import contextlib
import ctypes
import functools
import warnings

from zoo_probe import tag

log = []


def load(a, *, b=2):
    """Loads."""
    return tag(), a, b


def with_all_parameters(a, /, b, *c, d=7, e, **f):
    return a, b, c, d, e, f, tag()


with_all_parameters.__defaults__ = (8,)

registry = {}


def register(function):
    registry[function.__name__] = function
    return function


@register
def registered():
    return tag()


def make_closure():
    kept = "kept"

    def closure():
        return tag(), kept

    closure.__qualname__ = "closure"
    return closure


closure = make_closure()


def warns():
    warnings.warn("theirs", stacklevel=2)


def not_named():
    return tag()


def fail():
    raise KeyError(tag())


def inner():
    return tag()


def outer():
    return [tag(), inner(), tag()]


def count(number):
    try:
        for _ in range(number):
            yield tag()
    except GeneratorExit:
        log.append("closed in " + tag())
        raise


def count_kv(number):
    for _ in range(number):
        yield tag()


def talk():
    got = yield tag(), None
    while got != "stop":
        try:
            got = yield tag(), got
        except ValueError as error:
            got = str(error)
    return "done"


async def _steps():
    seen = []
    for _ in range(4):
        seen.append(tag())
        await asyncio.sleep(0)
    return seen


async def fetch():
    return await _steps()


async def fetch_kv():
    return await _steps()


async def watch():
    return await _steps()


async def fetch_forever():
    try:
        await asyncio.sleep(1000)
    except asyncio.CancelledError:
        log.append("cancelled in " + tag())
        raise


async def stream(number):
    try:
        for _ in range(number):
            await asyncio.sleep(0)
            yield tag()
    finally:
        log.append("stream ends in " + tag())


def plain_decorator(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


@plain_decorator
async def decorated():
    return await _steps()


@plain_decorator
def returns_generator(number):
    for _ in range(number):
        yield tag()


@contextlib.contextmanager
def keeper(name):
    yield tag(), name


@contextlib.asynccontextmanager
async def async_keeper():
    await asyncio.sleep(0)
    yield tag()


@functools.lru_cache
def cached(number):
    return tag()


def leaks_a_region():
    ctypes.CDLL(None).dormouse_region_begin(b"inner")
    return tag()


def hold(start, stop, seen):
    start.set()
    stop.wait()
    seen.append(tag())


class Cage:
    def method(self, number):
        return tag(), self, number

    @classmethod
    def build(cls, number):
        return tag(), cls, number

    @staticmethod
    def helper(number):
        return tag(), number

    def inherited(self):
        return tag()

    class Inner:
        def deep(self):
            return tag()


class Small(Cage):
    pass


class Made:
    def __init__(self, number):
        self.seen, self.number = tag(), number


class MadeNew(tuple):
    def __new__(cls, number):
        made = super().__new__(cls, (number,))
        made.seen = tag()
        return made


class Gate:
    def __init__(self):
        self.made = tag()

    def __enter__(self):
        return tag()

    def __exit__(self, *error):
        return None


class Thing:
    def __call__(self):
        return tag()


thing = Thing()
