"""A module with a look-up of names of its own, which fails."""


def __getattr__(name):
    raise RuntimeError("theirs")
