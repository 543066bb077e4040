"""What presets do beyond rules: vLLM's CuMemAllocator kept or replaced, torch_memory_saver's package made to
load this library. Follows python_rules.py in the same namespace.

Each function that presets.def names gives what to do with its module once that is imported.
"""


class _Trigger:
    def __init__(self, preset, function):
        self.preset, self._function = preset, function

    def __str__(self):
        return f"the preset @{self.preset}"

    def __call__(self, module):
        missing = self._function(module)
        if missing:
            _missing.setdefault(self.preset, []).extend(f"{module.__name__}:{name}" for name in missing)


def _absent(owner, names):
    return [name for name in names if _raw_attribute(owner, name) is None]


# --- vLLM
#
# Versions up to 0.1x refuse to make their allocator where PYTORCH_CUDA_ALLOC_CONF holds
# expandable_segments:True; later ones write the setting for the whole process, at first as a bare text that
# loses the user's other settings. Inside a region the setting is off on the thread, so neither is needed:
# this one module is told that it is off. Nothing else sees a change.


def vllm_kept(preset, torch):
    def apply(module):
        cls = getattr(module, "CuMemAllocator", None)
        if cls is None:
            return ["CuMemAllocator"]
        if not torch:
            _report(f"the preset @{preset} needs DORMOUSE_TORCH=auto; vLLM goes on by itself")
            return []
        absent = _absent(cls, ["use_memory_pool", "default_tag"])
        if not absent:
            _see_segments_off(module)
            cls.use_memory_pool = _dressed(_kept_pool(module, cls.use_memory_pool), cls.use_memory_pool)
        return ["CuMemAllocator." + name for name in absent]

    return _Trigger(preset, apply)


def _kept_pool(module, real):
    _learn_types()

    def use_memory_pool(self, tag=None):
        manager = real(self, tag)
        adapter = _adapters.get(type(manager))
        name = module.CuMemAllocator.default_tag if tag is None else tag
        return manager if adapter is None else adapter(manager, _PoolTag(str(name)))

    return use_memory_pool


class _PoolTag:
    """A tag by its name, for regions that enter a memory pool of their own."""

    def __init__(self, name):
        self.name = name


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


def _see_segments_off(module):
    real_os = getattr(module, "os", None)
    if real_os is not None and not isinstance(real_os, _EnvironmentView):
        module.os = _EnvironmentView(real_os, lambda: True)
    real_flag = getattr(module, "conf_flag_enabled", None)
    if real_flag is not None:

        def conf_flag_enabled(conf, key):
            return key != "expandable_segments" and real_flag(conf, key)

        module.conf_flag_enabled = _dressed(conf_flag_enabled, real_flag)


def vllm_replaced(preset, torch):
    def apply(module):
        cls = getattr(module, "CuMemAllocator", None)
        if cls is None:
            return ["CuMemAllocator"]
        if not torch:
            _report(f"the preset @{preset} needs DORMOUSE_TORCH=auto; vLLM goes on by itself")
            return []
        absent = _absent(cls, ["use_memory_pool", "sleep", "wake_up", "get_current_usage", "default_tag"])
        if not absent:
            _see_segments_off(module)
            _Replacement(module, cls).install()
        return ["CuMemAllocator." + name for name in absent]

    return _Trigger(preset, apply)


class _Replacement:
    """CuMemAllocator's public functions on Dormouse's pools, with vLLM's meaning: a sleep covers all memory
    that came from use_memory_pool, keeps the tags that it is told and discards the others; what sleeps already
    stays as it is."""

    def __init__(self, module, cls):
        self._module, self._cls = module, cls
        self._tags = {}  # names that use_memory_pool has had, in order

    def install(self):
        import contextlib

        for name in ("use_memory_pool", "cudagraph_pool"):
            if hasattr(self._cls, name):
                self._set(name, contextlib.contextmanager(getattr(self, "_" + name)()))
        for name in ("sleep", "wake_up", "discard", "get_current_usage"):
            if hasattr(self._cls, name):
                self._set(name, getattr(self, "_" + name)())

    def _set(self, name, function):
        setattr(self._cls, name, _dressed(function, getattr(self._cls, name)))

    def _use_memory_pool(self):
        def use_memory_pool(allocator, tag=None):
            if tag is None:
                tag = self._cls.default_tag
            assert isinstance(tag, str)
            self._tags[tag] = True
            old_tag, allocator.current_tag = getattr(allocator, "current_tag", None), tag
            span = _begin_named(tag)
            try:
                yield
            finally:
                _end(span)
                allocator.current_tag = old_tag

        return use_memory_pool

    def _cudagraph_pool(self):
        def cudagraph_pool(allocator):
            cuda = sys.modules["torch"].cuda
            self._tags["cudagraph"] = True
            if "cudagraph" not in allocator.allocator_and_pools:
                allocator.allocator_and_pools["cudagraph"] = [(cuda.MemPool(), None)]
            old_tag, allocator.current_tag = allocator.current_tag, "cudagraph"
            span = _begin_in_own_pool("cudagraph")
            try:
                yield allocator.allocator_and_pools["cudagraph"][0][0].id
            finally:
                _end(span)
                allocator.current_tag = old_tag

        return cudagraph_pool

    def _sleep(self):
        def sleep(allocator, offload_tags=None):
            if offload_tags is None:
                offload_tags = (self._cls.default_tag,)
            elif isinstance(offload_tags, str):
                offload_tags = (offload_tags,)
            assert isinstance(offload_tags, tuple)
            self._empty_cache()
            self._must(_sleep, [tag for tag in self._tags if tag in offload_tags])
            self._must(_discard, [tag for tag in self._tags if tag not in offload_tags])

        return sleep

    def _discard(self):
        def discard(allocator, tags):
            if isinstance(tags, str):
                tags = (tags,)
            self._must(_discard, [tag for tag in self._tags if tag in tags])

        return discard

    def _wake_up(self):
        def wake_up(allocator, tags=None):
            # Later versions wake with any wake the tags that cannot be named.
            deferrable = getattr(self._module, "DEFERRABLE_TAGS", None)
            self._must(
                _wake,
                [
                    tag
                    for tag in self._tags
                    if tags is None or tag in tags or (deferrable is not None and tag not in deferrable)
                ],
            )

        return wake_up

    def _get_current_usage(self):
        def get_current_usage(allocator):
            return _usage("\n".join(self._tags))

        return get_current_usage

    def _empty_cache(self):
        """What nobody uses need not be kept."""
        import gc

        gc.collect()
        self._module.torch.cuda.empty_cache()

    def _must(self, operation, tags):
        if not tags:
            return
        problem = operation("\n".join(tags))
        if problem is not None:
            raise RuntimeError(f"Dormouse: {', '.join(tags)}: {problem}")


# --- torch_memory_saver
#
# The package looks for its own library, puts that in front in new processes, and refuses to start where
# PYTORCH_CUDA_ALLOC_CONF holds expandable_segments:True. In its preload mode this library is the one that it
# looks for, and suspends the setting in its regions; in its mode `torch`, where it brings an allocator of its
# own, it goes on refusing.


def memory_saver_on_us(preset, torch):
    def apply(package):
        entry = sys.modules.get(package.__name__ + ".entrypoint")
        preload = sys.modules.get(package.__name__ + ".hooks.mode_preload")
        cls = getattr(preload, "HookUtilModePreload", None)
        absent = [name for name in ("HookUtilModePreload", "get_binary_path_from_package") if not hasattr(preload, name)]
        if cls is not None:
            absent += ["HookUtilModePreload." + name for name in _absent(cls, ["get_path_binary"])]
        if absent:
            return ["hooks.mode_preload." + name for name in absent]
        _load_us(preload, cls)
        if torch and hasattr(entry, "_sanity_checks"):
            absent = [name for name in ("_TorchMemorySaverImpl", "os") if not hasattr(entry, name)]
            if absent:
                return ["entrypoint." + name for name in absent]
            _do_not_refuse_segments(entry, entry._TorchMemorySaverImpl)
        return []

    return _Trigger(preset, apply)


def _load_us(preload, cls):
    real_path = preload.get_binary_path_from_package

    def get_path_binary(self):
        return _library_path(None)

    def get_binary_path_from_package(stem):
        return _library_path(None) if stem.endswith("_preload") else real_path(stem)

    cls.get_path_binary = _dressed(get_path_binary, cls.get_path_binary)
    preload.get_binary_path_from_package = _dressed(get_binary_path_from_package, real_path)


def _do_not_refuse_segments(entry, cls):
    """Only the check sees another environment, and only where the mode is preload."""
    making, checking = _thread._local(), _thread.allocate_lock()
    real_init, real_checks, real_os = cls.__init__, entry._sanity_checks, entry.os
    view = _EnvironmentView(real_os, lambda: getattr(making, "preload", False))

    def __init__(self, *arguments, **named):
        making.preload = (arguments[0] if arguments else named.get("hook_mode", "preload")) == "preload"
        try:
            real_init(self, *arguments, **named)
        finally:
            making.preload = False

    def _sanity_checks():
        with checking:
            entry.os = view
            try:
                return real_checks()
            finally:
                entry.os = real_os

    cls.__init__ = _dressed(__init__, real_init)
    entry._sanity_checks = _dressed(_sanity_checks, real_checks)
