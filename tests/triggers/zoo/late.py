"""Imported through a finder that stands in front of all others."""

from zoo_probe import tag


def function():
    return tag()
