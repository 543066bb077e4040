"""Makes regions of the Python functions that rules name, wherever and whenever their modules are imported.

Runs inside the program, compiled into the library (python_rules.cc), with no module of its own; embedding.py and
python_wrappers.py are in front of it, the presets' files that are asked for behind it. A finder in front of
sys.meta_path tells when a module with rules is there, and the functions get their regions.
"""

_watched = {}  # module name: what to do once it is imported, each called with the module
_children = {}  # package name: names of modules in it that rules name
_missing = {}  # preset: what it did not find
_early = []  # what took effect before CUDA was used


def start(text):
    """Lines of fields: rule, module, qualname, tag, preset, "some" if not all its versions have it; or trigger, module,
    function, "torch" or "", preset, nothing."""
    _learn_types()
    for line in text.split("\n"):
        kind, module, name, argument, preset, versions = line.split("\x1f")
        if kind == "rule":
            _watch(module, _Rule(module, name, int(argument), preset, versions == "some"))
        else:
            _watch(module, _Trigger(globals()[name], preset, argument == "torch"))
    if "__main__" in _watched:
        del _watched["__main__"]
        _report(
            "python(__main__:...): the program's own file is run, not imported, so its functions cannot be "
            "regions, and the rule is ignored. Name functions of imported modules, or put the program's into one"
        )
    _watch("importlib.util", _follow_specs)
    sys.meta_path.insert(0, _finder)
    for name in [*_children, *_watched]:
        module = sys.modules.get(name)
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            _imported(name, module)


def importing(*_):
    """Something is about to be imported: what the program put in front of the finder must not hide modules."""
    if not sys.meta_path or sys.meta_path[0] is not _finder:
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        sys.meta_path.insert(0, _finder)


def _watch(name, action):
    _watched.setdefault(name, []).append(action)
    while "." in name:
        child, name = name, name.rpartition(".")[0]
        _children.setdefault(name, set()).add(child)


def cuda_used():
    """Programs have set their path by now: what is not there is hardly imported any more."""
    import atexit

    global _early
    early, _early = _early, None
    if early is not None:  # the first time
        for text in early:
            _note(text)
        atexit.register(_tell_unused)
    for name, actions in list(_watched.items()):
        package = name.partition(".")[0]
        if package in sys.modules or _guarded(package, _finder.find, package, None) is not None:
            continue
        for what in {str(action) for action in actions}:
            _report(
                f"{what}: there is no module {package} on Python's path (sys.path) when CUDA is first used, so "
                "nothing is followed unless it comes later. Check the name, or install it"
            )


def _tell(text):
    """What takes effect; a program that does not use CUDA hears nothing of it."""
    if _early is None:
        _note(text)
    else:
        _early.append(text)


def _tell_unused():
    for actions in list(_watched.values()):
        for action in actions:
            if isinstance(action, _Rule):
                action.tell_if_unused()


def _guarded(what, function, *args):
    """For calls that come from the program: what goes wrong here is not the program's."""
    try:
        return function(*args)
    except Exception as error:
        _report(f"{what} is not followed: {type(error).__name__}: {error}. Leave it out, or name another function")


# --- Modules


_finder = _Finder(lambda name: name in _watched or name in _children, lambda name, module: _imported(name, module))


def _follow_specs(util):
    """For modules that the program loads from a file itself, without any finder."""
    for name in ("spec_from_file_location", "spec_from_loader"):
        setattr(util, name, _followed(getattr(util, name)))


def _followed(make_spec):
    def make(*args, **kwargs):
        spec = make_spec(*args, **kwargs)
        return _finder.follow(spec) if spec is not None and spec.name in _watched else spec

    return _dressed(make, make_spec)


def _imported(name, module):
    module = sys.modules.get(name, module)
    for action in _watched.get(name, ()):
        _guarded(action, action, module)
    for child in _children.get(name, ()):
        _guarded(child, _look_for_child, module, child)
    for preset, names in list(_missing.items()):
        del _missing[preset]
        if preset:
            _report(
                f"the preset @{preset} does not fit the installed {_version(name)}: there is no "
                f"{', '.join(names)}. The rest of it is in force; take another version of either, or write "
                "rules for that version"
            )
        else:
            for text in names:
                _report(text)


def _look_for_child(module, child):
    if child in sys.modules:  # made by its parent, not imported
        known = getattr(getattr(sys.modules[child], "__spec__", None), "_initializing", False)
        if not known:
            _imported(child, sys.modules[child])
        return
    path = getattr(module, "__path__", None)
    if path is not None and _finder.find(child, path) is not None:
        return
    if child not in _watched:
        return
    import pkgutil

    names = [each.name for each in pkgutil.iter_modules(path)] if path is not None else []
    parent, _, last = child.rpartition(".")
    for preset in {action.preset for action in _watched[child]}:
        text = child if preset else f"python({child}:...): {parent} has no module {last}" + _ignored(last, names)
        _missing.setdefault(preset, []).append(text)


def _version(module):
    package = module.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is None:
        try:
            import importlib.metadata

            version = importlib.metadata.version(package)
        except Exception:
            version = "(its version is unknown)"
    return f"{package} {version}"


def _ignored(name, names):
    """What follows where `name` is none of `names`."""
    import difflib

    near = difflib.get_close_matches(name, names, 3)
    return f"{', only ' if near else ''}{' and '.join(near)}. The rule is ignored; name what is there"


# --- Rules


class _Rule:
    def __init__(self, module, qualname, tag, preset, of_some_versions):
        self.module, self.qualname, self.tag, self.preset = module, qualname, tag, preset
        self._of_some_versions = of_some_versions
        self.wrapped = []  # the wrappers in force
        self._used = False

    def __str__(self):
        return f"the preset @{self.preset}" if self.preset else f"python({self.module}:{self.qualname})"

    def __call__(self, module):
        owner = module
        *owners, last = self.qualname.split(".")
        for place, part in enumerate([*owners, last]):
            if place == 0 and part not in vars(module) and _when_asked(module, part, self):
                return
            raw = _raw_attribute(owner, part)
            if raw is None:
                return self._missing(owner, part)
            if place < len(owners):
                owner = getattr(owner, part)
        if isinstance(raw, type):
            return self._wrap_class(raw)
        self._put(owner, last, raw)

    def _missing(self, owner, part):
        if self._of_some_versions:
            return
        name = getattr(owner, "__qualname__", None) or owner.__name__
        text = f"{self.module}:{self.qualname}"
        if not self.preset:
            text = f"{self}: {name} has no {part}" + _ignored(part, dir(owner))
        _missing.setdefault(self.preset, []).append(text)

    def _put(self, owner, name, raw, form=None):
        """Makes a region of a function, in place or by a wrapper of the form that it had. False if that cannot be."""
        inner = raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw
        if self._is_wrapped(inner):
            return True
        if not _is_function(inner):
            kind = type(inner)
            _report(
                f"python({self.module}:{self.qualname}) is a {kind.__module__}.{kind.__qualname__}, not a "
                "function, method or class. The rule is ignored; name the function that it calls"
            )
            return False
        if self._is_defined_here(owner, name, inner):
            self.wrapped.append(_wrap(inner, self.tag, form, True, self._took_effect))
            return True
        wrapper = _wrap(inner, self.tag, form, False, self._took_effect)
        try:
            setattr(owner, name, type(raw)(wrapper) if inner is not raw else wrapper)
        except (AttributeError, TypeError) as error:
            _report(
                f"python({self.module}:{self.qualname}) cannot be replaced: {error}. The rule is ignored; name what "
                "calls it"
            )
            return False
        self.wrapped.append(wrapper)
        return True

    def _took_effect(self):
        if not self._used:
            self._used = True
            _tell(f"{self._in_full()} took effect")

    def tell_if_unused(self):
        if not self._used:
            why = "its function was not called" if self.wrapped else f"there was no {self.qualname} in {self.module}"
            if self.module not in sys.modules:
                why = "its module was not imported"
            _note(f"{self._in_full()} never took effect: {why}")

    def _in_full(self):
        return f"python({self.module}:{self.qualname})" + (f" of the preset @{self.preset}" if self.preset else "")

    def _is_defined_here(self, owner, name, function):
        """Not brought in from elsewhere, where it is not to be a region."""
        if type(function) is not type(_wrap) or function.__module__ != self.module:
            return False
        inside = getattr(owner, "__qualname__", "") if isinstance(owner, type) else ""
        return function.__qualname__ == (f"{inside}.{name}" if inside else name)

    def _is_wrapped(self, function):
        while function is not None:
            if any(function is each for each in self.wrapped):
                return True
            function = getattr(function, "__wrapped__", None)
        return False

    def _wrap_class(self, cls):
        managers = False
        for enter, leave in (("__enter__", "__exit__"), ("__aenter__", "__aexit__")):
            first, last = _raw_attribute(cls, enter), _raw_attribute(cls, leave)
            if first is not None and last is not None:
                managers = True
                self._put(cls, enter, first, "enter")
                self._put(cls, leave, last, "exit")
        if managers:
            return
        found = False
        for name in ("__new__", "__init__"):
            raw = _raw_attribute(cls, name)
            if raw is not getattr(object, name) and raw is not object.__dict__[name]:
                found = True
                if not self._put(cls, name, raw):
                    return
        if not found:
            _report(
                f"python({self.module}:{self.qualname}) is a class that does nothing when it is constructed. "
                "The rule is ignored; name one of its methods"
            )


def _when_asked(module, name, rule):
    """Some modules make what they have when it is asked for, and import much for it. The rule waits until the program
    asks. False if the module is none of them."""

    def follow(value):
        if name not in vars(module):
            vars(module)[name] = value  # from now on there is one
        _guarded(rule, rule, module)

    real = vars(module).get("__getattr__")
    if real is not None:

        def __getattr__(asked):
            value = real(asked)
            if asked == name:
                follow(value)
                value = vars(module)[name]
            return value

        module.__getattr__ = _dressed(__getattr__, real)
        return True
    cls = type(module)
    if not hasattr(cls, "__getattr__"):
        return False

    class Asked(cls):
        def __getattr__(self, asked):
            value = super().__getattr__(asked)
            if asked == name:
                follow(value)
                value = vars(module)[name]
            return value

    Asked.__name__, Asked.__qualname__, Asked.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    module.__class__ = Asked
    return True


def _raw_attribute(owner, name):
    """The attribute as it is stored, without binding; None if there is none."""
    if isinstance(owner, type):
        for cls in owner.__mro__:
            if name in cls.__dict__:
                return cls.__dict__[name]
    return getattr(owner, name, None)


def _is_function(thing):
    kind = type(thing)
    return kind.__name__ in (
        "function",
        "method",
        "builtin_function_or_method",
        "method_descriptor",
        "wrapper_descriptor",
        "_lru_cache_wrapper",
        "cython_function_or_method",
    )


# --- Presets


class _Trigger:
    """A preset's function, called once its module is there; gives the names that it did not find in it."""

    def __init__(self, function, preset, torch):
        self._function, self.preset, self._torch = function, preset, torch

    def __str__(self):
        return f"the preset @{self.preset}"

    def __call__(self, module):
        missing = self._function(module, self.preset, self._torch)
        if missing:
            _missing.setdefault(self.preset, []).extend(f"{module.__name__}:{name}" for name in missing)
        else:
            _tell(f"{self} took effect in {module.__name__}")


def _absent(owner, names):
    return [name for name in names if _raw_attribute(owner, name) is None]


class _EnvironmentView:
    """The module's os, whose environ does not tell of expandable segments while hidden() is true."""

    _VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

    def __init__(self, real, hidden):
        view = self

        class Environ(type(real.environ)):
            def __init__(self):
                self.__dict__ = real.environ.__dict__  # the same variables

            def __getitem__(self, name):
                return view._seen(name, super().__getitem__(name))

        self._real, self._hidden, self.environ = real, hidden, Environ()

    def __getattr__(self, name):
        return getattr(self._real, name)

    def _seen(self, name, value):
        if name not in self._VARIABLES or value is None or not self._hidden():
            return value
        return ",".join(each for each in value.split(",") if each.partition(":")[0].strip() != "expandable_segments")

    def getenv(self, name, default=None):
        return self.environ.get(name, default)
