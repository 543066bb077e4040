"""How the package finds the library that it works on."""

from ..utils import get_binary_path_from_package


class HookUtilModePreload:
    def get_path_binary(self):
        raise AssertionError("LD_PRELOAD has no library of theirs")


def configure_subprocess():
    raise AssertionError("not of a stand-in")
