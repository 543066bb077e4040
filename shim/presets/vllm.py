"""The presets for vLLM: its sleep mode with its CuMemAllocator kept, or replaced by Dormouse's pools, and a server without
sleep mode.

Versions up to 0.1x refuse to make their allocator where PYTORCH_CUDA_ALLOC_CONF holds
expandable_segments:True; later ones write the setting for the whole process, at first as a bare text that
loses the user's other settings. Inside a region the setting is off on the thread, so neither is needed:
this one module is told that it is off. Nothing else sees a change.

The loader of 0.24 and around asks for a bare max_split_size_mb, which takes the user's other settings back to their defaults
for the process's life, as PyTorch reads it. Later ones add the key to what is in force and write that back at the end. Inside a
region that has the key already neither is done; elsewhere the whole text is kept.
"""

_RULES = {
    "weights{max_split_size_mb:20}: api": 'what is made in use_memory_pool("weights"), with the setting that later '
    "versions use",
    "kv_cache: api": 'what is made in use_memory_pool("kv_cache")',
}
_KEPT = {
    "kv_cache": "vLLM's prefix cache, the requests in flight and the block tables of its newer model runner count on the "
    "content of the key-value cache",
}
_KEEPS_SETTINGS = {
    "vllm.v1.worker.gpu_worker": (
        "vllm_keeps_settings",
        "a loader that asks for max_split_size_mb alone does not lose the user's other settings",
    ),
}

PRESETS = {
    "vllm": {
        "program": "vLLM",
        "versions": "0.10 to 0.33",
        "help": "vLLM's own sleep mode with expandable segments on for all the rest.",
        "rules": _RULES,
        "kept": _KEPT,
        "triggers": {
            "vllm.device_allocator.cumem": (
                "vllm_kept",
                "CuMemAllocator.use_memory_pool(tag) is a region of its tag, and the module does not see "
                "expandable segments, which it would refuse or switch off for the process; what its wake maps again "
                "has its tag again",
            ),
            **_KEEPS_SETTINGS,
        },
    },
    "vllm:replace": {
        "program": "vLLM",
        "versions": "0.10 to 0.33",
        "help": "vLLM's sleep mode on Dormouse's pools, so that `dormouse sleep` works too.",
        "rules": _RULES,
        "kept": _KEPT,
        "triggers": {
            "vllm.device_allocator.cumem": (
                "vllm_replaced",
                "CuMemAllocator's use_memory_pool, sleep, wake_up, discard, cudagraph_pool and "
                "get_current_usage are Dormouse's, with the same meaning",
            ),
            **_KEEPS_SETTINGS,
        },
    },
    "vllm:server": {
        "program": "vLLM",
        "versions": "0.24 to 0.33",
        "help": "A server without vLLM's sleep mode, which is put to sleep from outside.",
        "rules": {
            "weights{max_split_size_mb:20}: python(vllm.v1.worker.gpu_worker:Worker.load_model)": "the model, of either "
            "model runner",
            "kv_cache: python(vllm.v1.worker.gpu_worker:Worker.initialize_from_config)": "the cache and its tables",
        },
        "kept": _KEPT,
        "triggers": _KEEPS_SETTINGS,
    },
}


def vllm_kept(module, preset, torch):
    cls = getattr(module, "CuMemAllocator", None)
    if cls is None:
        return ["CuMemAllocator"]
    if not torch:
        _report(f"the preset @{preset} needs DORMOUSE_TORCH=auto; vLLM goes on by itself")
        return []
    absent = ["CuMemAllocator." + name for name in _absent(cls, ["use_memory_pool", "default_tag"])]
    absent += _absent(module, ["create_and_map"])
    if not absent:
        _see_segments_off(module)
        cls.use_memory_pool = _dressed(_kept_pool(module, cls.use_memory_pool), cls.use_memory_pool)
        module.create_and_map = _dressed(_kept_mapping(cls, module.create_and_map), module.create_and_map)
    return absent


def _kept_mapping(cls, real):
    """What vLLM's wake maps again is in the region that it was first made in."""

    def create_and_map(allocation_handle):
        data = getattr(getattr(cls, "instance", None), "pointer_to_data", {}).get(allocation_handle[2])
        if data is None:
            return real(allocation_handle)
        span = _begin_in_own_pool(str(data.tag))
        try:
            return real(allocation_handle)
        finally:
            _end(span)

    return create_and_map


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


def _see_segments_off(module):
    real_os = getattr(module, "os", None)
    if real_os is not None and not isinstance(real_os, _EnvironmentView):
        module.os = _EnvironmentView(real_os, lambda: True)
    real_flag = getattr(module, "conf_flag_enabled", None)
    if real_flag is not None:

        def conf_flag_enabled(conf, key):
            return key != "expandable_segments" and real_flag(conf, key)

        module.conf_flag_enabled = _dressed(conf_flag_enabled, real_flag)


def vllm_keeps_settings(module, preset, torch):
    cls = getattr(module, "Worker", None)
    if cls is None:
        return ["Worker"]
    real = _raw_attribute(cls, "_scoped_allocator_max_split")
    if real is not None:
        import contextlib

        cls._scoped_allocator_max_split = _dressed(contextlib.contextmanager(_max_split_size(real)), real)
    return []


def _max_split_size(real):
    code = getattr(getattr(real, "__wrapped__", None), "__code__", None)
    asks_for_one_key = code is not None and "original_settings" not in code.co_varnames

    def scoped(worker, max_split_size_mb):
        torch = sys.modules["torch"]
        wanted = f"max_split_size_mb:{max_split_size_mb}"
        try:
            kept = torch.cuda.memory._snapshot()["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"].strip(", ")
        except Exception:  # another allocator than PyTorch's own
            kept = None
        if kept is not None and wanted in kept.split(","):
            yield  # the region has it, and what is in force inside is not to be written back for the process
        elif kept is not None and asks_for_one_key:
            torch._C._accelerator_setAllocatorSettings(f"{kept},{wanted}".lstrip(","))
            try:
                yield
            finally:
                torch._C._accelerator_setAllocatorSettings(kept)
        else:
            with real(worker, max_split_size_mb):
                yield

    return scoped


def vllm_replaced(module, preset, torch):
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
        if hasattr(self._module, "AllocationData"):
            # Assigned to by the constructor.
            self._cls.pointer_to_data = property(self._pointer_to_data, lambda allocator, data: None)

    def _set(self, name, function):
        setattr(self._cls, name, _dressed(function, getattr(self._cls, name)))

    def _use_memory_pool(self):
        def use_memory_pool(allocator, tag=None):
            if tag is None:
                tag = self._cls.default_tag
            assert isinstance(tag, str)
            if tag in self._tags and tag != getattr(allocator, "current_tag", None):
                self._module.torch.cuda.empty_cache()  # what was freed of the tag since
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

    def _pointer_to_data(self, allocator):
        """vLLM's table of its memory, for who reads it: address: handle, tag, whether it sleeps."""
        table = {}
        for tag in self._tags:
            for line in _blocks(tag).splitlines():
                address, size, device, asleep = map(int, line.split())
                table[address] = data = self._module.AllocationData((device, size, address, 0), tag)
                data.is_asleep = bool(asleep)
        return table

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
