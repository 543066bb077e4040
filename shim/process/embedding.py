"""Shared by the parts of the library that run inside the program's Python (python_rules.py, pools.py), each of which is
compiled with this file in front, in a namespace of its own: being told when a module has been imported, and wrappers that
look like what they wrap.
"""

import _thread
import sys


class _Finder:
    """Finds nothing itself: asks the others for the modules that `follows` names, and has their loaders tell
    when the modules are there."""

    def __init__(self, follows, tell):
        self._follows, self._tell = follows, tell
        self._finding = set()  # (thread, module name): finders that ask us again

    def find_spec(self, name, path=None, target=None):
        key = (_thread.get_ident(), name)
        if not self._follows(name) or key in self._finding:
            return None
        self._finding.add(key)
        try:
            return self.follow(self.find(name, path, target))
        finally:
            self._finding.discard(key)

    def find(self, name, path, target=None):
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if find is not None and finder is not self:
                spec = find(name, path, target)
                if spec is not None:
                    return spec
        return None

    def follow(self, spec):
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, spec.name, self._tell)
        return spec


class _Loader:
    """The module's own loader, which puts itself back before it runs the module."""

    def __init__(self, loader, name, tell):
        self._loader, self._name, self._tell = loader, name, tell

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec) if hasattr(self._loader, "create_module") else None

    def exec_module(self, module):
        module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._tell(self._name, module)


def _dressed(wrapper, function):
    """With the name, text, signature and extras of the function."""
    import functools

    functools.update_wrapper(wrapper, function)
    for name in ("cache_info", "cache_clear", "cache_parameters"):
        if hasattr(function, name) and not hasattr(wrapper, name):
            setattr(wrapper, name, getattr(function, name))
    return wrapper
