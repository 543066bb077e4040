"""The wrappers of python_rules.py: a region around what a function runs. Around a call, around each resumption of a
generator or coroutine, from enter to exit of a context manager.

A Python function keeps being itself: its code is exchanged for code that has the same parameters and runs a copy of the
function as it was (its __wrapped__) inside the region. So whoever has the function already, by import or in a registry,
has the region too, and pickling finds it under its name. What cannot be changed in place gets a wrapper.

_begin(tag) returns a region's number, _end(number) ends it; neither raises.
"""

_CO_GENERATOR, _CO_COROUTINE, _CO_ITERABLE_COROUTINE, _CO_ASYNC_GENERATOR = 0x20, 0x80, 0x100, 0x200

_enter_spans = {}  # id of a context manager: its regions that are open, their threads, and who tells of its end
_adapters = {}  # type of a result that runs after the call: what makes regions of it

# The code of each form. Names in angle brackets are constants of the code; {self} is the first argument.
_FORMS = {
    "call": """
    dormouse_span = <begin>(<tag>, None)
    try:
        dormouse_result = <function>({arguments})
    finally:
        <end>(<tag>, dormouse_span)
    return <adapt>(<tag>, dormouse_result)
""",
    "generator": """
    return (yield from <drive>(<tag>, <function>({arguments})))
""",
    "coroutine": """
    return await <driven>(<tag>, <function>({arguments}))
""",
    "async generator": """
    dormouse_generator = <function>({arguments})
    dormouse_step = dormouse_generator.asend(None)
    while True:
        try:
            dormouse_item = await <driven>(<tag>, dormouse_step)
        except <stop>:
            return
        try:
            dormouse_step = dormouse_generator.asend((yield dormouse_item))
        except <any> as dormouse_error:  # a close too: what runs then belongs to the region
            dormouse_step = dormouse_generator.athrow(dormouse_error)
""",
    "enter": """
    <open>(<tag>, {self})
    try:
        return {maybe_await}<function>({arguments})
    except <any>:
        <close>(<tag>, {self})
        raise
""",
    "exit": """
    try:
        return {maybe_await}<function>({arguments})
    finally:
        <close>(<tag>, {self})
""",
}


def _wrap(function, tag, form=None, in_place=False, first_use=None):
    """The function with a region of the tag around it: itself, or a wrapper. `first_use` is called once."""
    _learn_types()
    flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
    if form is None:
        form = (
            "async generator"
            if flags & _CO_ASYNC_GENERATOR
            else "coroutine" if flags & _CO_COROUTINE else "generator" if flags & _CO_GENERATOR else "call"
        )
    kind = type(_wrap)
    inner = _copy(function) if in_place else function
    constants = _constants(inner, tag)
    if first_use is not None:
        for name in ("begin", "drive", "driven", "open"):
            constants[name].tell_first(first_use)
    code = _code(function if type(function) is kind else None, form, flags, in_place, constants)
    if in_place:
        function.__code__ = code
        wrapper, wrapper.__wrapped__ = function, inner
    else:
        wrapper = kind(code, {})
        if type(function) is kind:
            wrapper.__defaults__, wrapper.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
        wrapper = _dressed(wrapper, function)
    # torch.compile goes on with this in its place.
    wrapper._torchdynamo_inline = inner
    return wrapper


def _constants(function, tag):
    return {
        "function": function,
        "tag": tag,
        "stop": StopAsyncIteration,
        "any": BaseException,
        "begin": _Helper(lambda tag, _: _begin(tag)),
        "end": _Helper(lambda _, span: _end(span)),
        "adapt": _Helper(_adapt),
        "drive": _Helper(_drive),
        "driven": _Helper(_Driven),
        "open": _Helper(_open_span),
        "close": _Helper(lambda _, manager: _close_span(manager)),
    }


class _Helper:
    """What a wrapper calls. Copied to another process with the wrapper (cloudpickle does so by value), it gives its second
    argument back."""

    __slots__ = ("_function", "__weakref__")

    def __init__(self, function):
        self._function = function

    def __call__(self, tag, what):
        return self._function(tag, what)

    def tell_first(self, tell):
        function = self._function

        def first(tag, what):
            self._function = function
            tell()
            return function(tag, what)

        self._function = first

    def __reduce__(self):
        import functools
        import typing

        return functools.partial, (typing.cast,)


def _copy(function):
    copy = type(function)(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__"):
        setattr(copy, name, getattr(function, name))
    name = "__annotate__" if hasattr(function, "__annotate__") else "__annotations__"
    setattr(copy, name, getattr(function, name))
    copy.__dict__.update(function.__dict__)
    return copy


def _code(function, form, flags, in_place, constants):
    """Code of the form, with the parameters of the function; with its free variables too, so that it can take the place of
    the function's own."""
    parameters, arguments, first = ["*args", "**kwargs"], ["*args", "**kwargs"], "args[0]"
    free = ()
    if function is not None:
        names = function.__code__.co_varnames
        if all(name.isidentifier() for name in names):
            parameters, arguments, first = _parameters(function.__code__)
        free = function.__code__.co_freevars if in_place else ()
    body = _FORMS[form].format(
        arguments=", ".join(arguments), self=first, maybe_await="await " if flags & _CO_COROUTINE else ""
    )
    start = "".join(f"    dormouse_{name} = 'dormouse: {name}'\n" for name in constants if f"<{name}>" in body)
    for name in constants:
        body = body.replace(f"<{name}>", f"dormouse_{name}")
    is_async = "async " if "await" in body else ""
    text = f"{is_async}def wrapper({', '.join(parameters)}):\n{start}{body}"
    if free:
        text = text.rstrip() + f"\n    if 0: {', '.join(free)}\n"
        text = f"def outer({', '.join(free)}):\n" + "".join(f"    {line}\n" for line in text.splitlines())
    made = compile(text, _code.__code__.co_filename, "exec")
    while made.co_name != "wrapper":
        made = next(each for each in made.co_consts if type(each) is type(made))
    values = {f"dormouse: {name}": value for name, value in constants.items()}
    made = made.replace(
        co_consts=tuple(values.get(each, each) if type(each) is str else each for each in made.co_consts),
        co_flags=made.co_flags | flags & _CO_ITERABLE_COROUTINE,
    )
    if function is not None:
        made = made.replace(co_name=function.__code__.co_name)
        if hasattr(made, "co_qualname"):
            made = made.replace(co_qualname=function.__code__.co_qualname)
    return made


def _parameters(code):
    """As they are declared, as they are passed on, and the first one's name."""
    positional = list(code.co_varnames[: code.co_argcount])
    named = list(code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount])
    rest = list(code.co_varnames[code.co_argcount + code.co_kwonlyargcount :])
    declared, passed = list(positional), list(positional)
    if code.co_posonlyargcount:
        declared.insert(code.co_posonlyargcount, "/")
    if code.co_flags & 0x04:
        name = "*" + rest.pop(0)
        declared.append(name)
        passed.append(name)
        first = name[1:] + "[0]"
    elif named:
        declared.append("*")
    declared += named
    passed += [f"{name}={name}" for name in named]
    if code.co_flags & 0x08:
        name = "**" + rest.pop(0)
        declared.append(name)
        passed.append(name)
    if positional:
        first = positional[0]
    return declared, passed, first if positional or code.co_flags & 0x04 else "None"


def _adapt(tag, result):
    adapter = _adapters.get(type(result))
    return result if adapter is None else adapter(result, tag)


def _drive(tag, inner):
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

    def __init__(self, tag, inner):
        self._tag, self._inner = tag, inner

    def __await__(self):
        return _drive(self._tag, self._inner)


def _adapt_generator(generator, tag):
    return _named_like(_drive(tag, generator), generator)


def _adapt_coroutine(coroutine, tag):
    async def run():
        return await _Driven(tag, coroutine)

    return _named_like(run(), coroutine)


def _adapt_async_generator(generator, tag):
    return _named_like(_wrap(lambda: generator, tag, "async generator")(), generator)


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
            try:
                return super().__exit__(*error)
            finally:
                _close_span(self)

    class AsyncRegionManager(contextlib._AsyncGeneratorContextManager):
        async def __aenter__(self):
            _open_span(self._tag, self)
            try:
                return await super().__aenter__()
            except BaseException:
                _close_span(self)
                raise

        async def __aexit__(self, *error):
            try:
                return await super().__aexit__(*error)
            finally:
                _close_span(self)

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


def _entered(manager, tag, enter):
    _open_span(tag, manager)
    try:
        return enter()
    except BaseException:
        _close_span(manager)
        raise


def _open_span(tag, manager):
    span = _begin(tag) if isinstance(tag, int) else _begin_in_own_pool(tag.name)
    key = id(manager)
    if key not in _enter_spans:
        _enter_spans[key] = ([], _tells_of_end(manager, key))
    _enter_spans[key][0].append((span, _thread.get_ident()))


def _tells_of_end(manager, key):
    """A manager that is dropped instead of left ends its regions with it, if its type can tell."""
    import weakref

    try:
        return weakref.ref(manager, lambda _: _dropped(key))
    except TypeError:
        return None


def _dropped(key):
    for span, _ in _enter_spans.pop(key, ((), None))[0]:
        _end(span)


def _close_span(manager):
    spans, _ = _enter_spans.get(id(manager), ((), None))
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
