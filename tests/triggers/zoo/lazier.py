"""As zoo.lazy, by a type of its own."""

import sys


class _Lazy(type(sys)):
    def __getattr__(self, name):
        if name != "function":
            raise AttributeError(name)
        import zoo.heavy

        return zoo.heavy.function


sys.modules[__name__] = _Lazy(__name__)
