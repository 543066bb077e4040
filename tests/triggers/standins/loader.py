"""A program's function that makes memory."""


def load(make):
    return make()
