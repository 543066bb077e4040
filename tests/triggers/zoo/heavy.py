"""What zoo.lazy gets its things from."""

from zoo_probe import tag


class Heavy:
    def method(self):
        return tag()


def function():
    return tag()
