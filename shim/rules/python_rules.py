"""Makes regions of the Python functions that rules name, wherever and whenever their modules are imported.

Runs inside the program, compiled into the library (python_rules.cc), with no module of its own; embedding.py is
in front of it, the presets' files that are asked for behind it. A finder in front of sys.meta_path tells when a
module with rules is there, and wrappers are put in the places of the functions. A region lies around what runs: around a
call, around each resumption of a generator or coroutine, from enter to exit of a context manager.

_begin(tag) returns a region's number, _end(number) ends it; neither raises.
"""

_CO_GENERATOR, _CO_COROUTINE, _CO_ITERABLE_COROUTINE, _CO_ASYNC_GENERATOR = 0x20, 0x80, 0x100, 0x200

_watched = {}  # module name: what to do once it is imported, each called with the module
_children = {}  # package name: names of modules in it that rules name
_missing = {}  # preset: what it did not find
_enter_spans = {}  # id of a context manager: its regions that are open, and their threads
_adapters = {}  # type of a result that runs after the call: what makes regions of it


def start(text):
    """Lines of fields: rule, module, qualname, tag, preset; or trigger, module, function, "torch" or "", preset."""
    _learn_types()
    for line in text.split("\n"):
        kind, module, name, argument, preset = line.split("\x1f")
        if kind == "rule":
            _watch(module, _Rule(module, name, int(argument), preset))
        else:
            _watch(module, _Trigger(globals()[name], preset, argument == "torch"))
    if "__main__" in _watched:
        del _watched["__main__"]
        _report(
            "python(__main__:...): the program's own file is run, not imported, so its functions cannot be "
            "regions, and the rule is ignored. Name functions of imported modules, or put the program's into one"
        )
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
    for name, actions in list(_watched.items()):
        package = name.partition(".")[0]
        if package in sys.modules or _guarded(package, _finder.find, package, None) is not None:
            continue
        for what in {str(action) for action in actions}:
            _report(
                f"{what}: there is no module {package} on Python's path (sys.path) when CUDA is first used, so "
                "nothing is followed unless it comes later. Check the name, or install it"
            )


def _guarded(what, function, *args):
    """For calls that come from the program: what goes wrong here is not the program's."""
    try:
        return function(*args)
    except Exception as error:
        _report(f"{what} is not followed: {type(error).__name__}: {error}. Leave it out, or name another function")


# --- Modules


_finder = _Finder(lambda name: name in _watched or name in _children, lambda name, module: _imported(name, module))


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
    def __init__(self, module, qualname, tag, preset):
        self.module, self.qualname, self.tag, self.preset = module, qualname, tag, preset
        self.wrapped = []  # the wrappers in force

    def __str__(self):
        return f"the preset @{self.preset}" if self.preset else f"python({self.module}:{self.qualname})"

    def __call__(self, module):
        owner = module
        *owners, last = self.qualname.split(".")
        for part in owners:
            if not hasattr(owner, part):
                return self._missing(owner, part)
            owner = getattr(owner, part)
        raw = _raw_attribute(owner, last)
        if raw is None:
            return self._missing(owner, last)
        if isinstance(raw, type):
            return self._wrap_class(raw)
        self._put(owner, last, raw)

    def _missing(self, owner, part):
        name = getattr(owner, "__qualname__", None) or owner.__name__
        text = f"{self.module}:{self.qualname}"
        if not self.preset:
            text = f"{self}: {name} has no {part}" + _ignored(part, dir(owner))
        _missing.setdefault(self.preset, []).append(text)

    def _put(self, owner, name, raw, wrap=None):
        """Puts a wrapper in the place of a function, in the form that it had. False if that cannot be."""
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
        wrapper = (wrap or _wrap_function)(inner, self.tag)
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

    def _is_wrapped(self, function):
        while function is not None:
            if any(function is each for each in self.wrapped):
                return True
            function = getattr(function, "__wrapped__", None)
        return False

    def _wrap_class(self, cls):
        managers = False
        for enter, leave, wrap_enter, wrap_leave in (
            ("__enter__", "__exit__", _wrap_enter, _wrap_exit),
            ("__aenter__", "__aexit__", _wrap_async_enter, _wrap_async_exit),
        ):
            first, last = _raw_attribute(cls, enter), _raw_attribute(cls, leave)
            if first is not None and last is not None:
                managers = True
                self._put(cls, enter, first, wrap_enter)
                self._put(cls, leave, last, wrap_leave)
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


# --- Functions


def _wrap_function(function, tag):
    _learn_types()
    flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
    if flags & _CO_ASYNC_GENERATOR:
        wrapper = _async_generator_wrapper(function, tag)
    elif flags & _CO_COROUTINE:
        wrapper = _coroutine_wrapper(function, tag)
    elif flags & _CO_GENERATOR:
        wrapper = _generator_wrapper(function, tag)
        if flags & _CO_ITERABLE_COROUTINE:
            import types

            wrapper = types.coroutine(wrapper)
    else:
        wrapper = _call_wrapper(function, tag)
    return _dressed(wrapper, function)


def _call_wrapper(function, tag):
    begin, end, adapters = _begin, _end, _adapters

    def wrapper(*args, **kwargs):
        span = begin(tag)
        try:
            result = function(*args, **kwargs)
        finally:
            end(span)
        if type(result) in adapters:
            return adapters[type(result)](result, tag)
        return result

    return wrapper


def _generator_wrapper(function, tag):
    def wrapper(*args, **kwargs):
        return (yield from _drive(function(*args, **kwargs), tag))

    return wrapper


def _coroutine_wrapper(function, tag):
    async def wrapper(*args, **kwargs):
        return await _Driven(function(*args, **kwargs), tag)

    return wrapper


def _async_generator_wrapper(function, tag):
    async def wrapper(*args, **kwargs):
        generator = function(*args, **kwargs)
        step = generator.asend(None)
        while True:
            try:
                item = await _Driven(step, tag)
            except StopAsyncIteration:
                return
            try:
                step = generator.asend((yield item))
            except BaseException as error:  # a close too: what runs then belongs to the region
                step = generator.athrow(error)

    return wrapper


def _drive(inner, tag):
    """Runs a generator or coroutine with a region around each of its steps."""
    begin, end = _begin, _end
    step, argument = inner.send, None
    while True:
        span = begin(tag)
        try:
            item = step(argument)
        except StopIteration as stop:
            return stop.value
        finally:
            argument = None
            end(span)
        try:
            argument = yield item
            step = inner.send
        except BaseException as error:  # a close too: what runs then belongs to the region
            step, argument = inner.throw, error


class _Driven:
    """For await: an awaitable of CPython's own with a region around each of its steps."""

    __slots__ = ("_inner", "_tag")

    def __init__(self, inner, tag):
        self._inner, self._tag = inner, tag

    def __await__(self):
        return _drive(self._inner, self._tag)


def _adapt_generator(generator, tag):
    return _named_like(_drive(generator, tag), generator)


def _adapt_coroutine(coroutine, tag):
    async def run():
        return await _Driven(coroutine, tag)

    return _named_like(run(), coroutine)


def _adapt_async_generator(generator, tag):
    return _named_like(_async_generator_wrapper(lambda: generator, tag)(), generator)


def _named_like(made, original):
    made.__name__, made.__qualname__ = original.__name__, original.__qualname__
    return made


def _learn_types():
    """What functions return that runs only later."""
    if _adapters:
        return

    def generator():
        yield

    async def coroutine():
        pass

    async def async_generator():
        yield

    never_run = coroutine()
    _adapters[type(never_run)] = _adapt_coroutine
    never_run.close()
    _adapters[type(generator())] = _adapt_generator
    _adapters[type(async_generator())] = _adapt_async_generator
    _learn_context_managers()


# --- Context managers


def _learn_context_managers():
    import contextlib

    class RegionManager(contextlib._GeneratorContextManager):
        def __enter__(self):
            return _entered(self, self._tag, super().__enter__)

        def __exit__(self, *error):
            return _left(self, super().__exit__, *error)

    class AsyncRegionManager(contextlib._AsyncGeneratorContextManager):
        async def __aenter__(self):
            return await _async_entered(self, self._tag, super().__aenter__)

        async def __aexit__(self, *error):
            return await _async_left(self, super().__aexit__, *error)

    def recreate(cls):
        def _recreate_cm(self):  # of a context manager that serves as a decorator
            made = type(self)(self.func, self.args, self.kwds)
            made._tag = self._tag
            return made

        cls._recreate_cm = _recreate_cm

    def adapt_to(cls):
        def adapt(manager, tag):
            manager.__class__ = cls
            manager._tag = tag
            return manager

        return adapt

    for cls in (RegionManager, AsyncRegionManager):
        base = cls.__mro__[1]
        cls.__name__, cls.__qualname__, cls.__module__ = base.__name__, base.__qualname__, base.__module__
        recreate(cls)
        _adapters[base] = adapt_to(cls)


def _open_span(manager, tag):
    span = _begin(tag) if isinstance(tag, int) else _begin_in_own_pool(tag.name)
    _enter_spans.setdefault(id(manager), []).append((span, _thread.get_ident()))


def _close_span(manager):
    spans = _enter_spans.get(id(manager))
    if not spans:
        return
    span, thread = spans.pop()
    if not spans:
        del _enter_spans[id(manager)]
    if thread != _thread.get_ident():
        _report(
            "a context manager that is a region was entered on one thread and left on another: the region "
            "lasts until its thread ends. Name a function instead"
        )
    _end(span)


def _entered(manager, tag, enter, *args):
    _open_span(manager, tag)
    try:
        return enter(*args)
    except BaseException:
        _close_span(manager)
        raise


def _left(manager, leave, *args):
    try:
        return leave(*args)
    finally:
        _close_span(manager)


async def _async_entered(manager, tag, enter, *args):
    _open_span(manager, tag)
    try:
        return await enter(*args)
    except BaseException:
        _close_span(manager)
        raise


async def _async_left(manager, leave, *args):
    try:
        return await leave(*args)
    finally:
        _close_span(manager)


def _wrap_enter(function, tag):
    def wrapper(self):
        return _entered(self, tag, function, self)

    return _dressed(wrapper, function)


def _wrap_exit(function, tag):
    def wrapper(self, *error):
        return _left(self, function, self, *error)

    return _dressed(wrapper, function)


def _wrap_async_enter(function, tag):
    async def wrapper(self):
        return await _async_entered(self, tag, function, self)

    return _dressed(wrapper, function)


def _wrap_async_exit(function, tag):
    async def wrapper(self, *error):
        return await _async_left(self, function, self, *error)

    return _dressed(wrapper, function)


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


def _absent(owner, names):
    return [name for name in names if _raw_attribute(owner, name) is None]


class _EnvironmentView:
    """The module's os, whose environ does not tell of expandable segments while hidden() is true."""

    _VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

    class _Environ:
        def __init__(self, real, seen):
            self._real, self._seen = real, seen

        def __getattr__(self, name):
            return getattr(self._real, name)

        def __contains__(self, name):
            return name in self._real

        def __setitem__(self, name, value):
            self._real[name] = value

        def __getitem__(self, name):
            return self._seen(name, self._real[name])

        def get(self, name, default=None):
            return self._seen(name, self._real.get(name, default))

    def __init__(self, real, hidden):
        self._real, self._hidden = real, hidden

    def __getattr__(self, name):
        return getattr(self._real, name)

    def _seen(self, name, value):
        if name not in self._VARIABLES or value is None or not self._hidden():
            return value
        return ",".join(each for each in value.split(",") if each.partition(":")[0].strip() != "expandable_segments")

    @property
    def environ(self):
        return self._Environ(self._real.environ, self._seen)

    def getenv(self, name, default=None):
        return self._seen(name, self._real.getenv(name, default))
