"""The preset for torch_memory_saver, which SGLang, slime, miles and verl use.

The package looks for its own library, puts that in front in new processes, and refuses to start where
PYTORCH_CUDA_ALLOC_CONF holds expandable_segments:True. In its preload mode this library is the one that it
looks for, and suspends the setting in its regions; in its mode `torch`, where it brings an allocator of its
own, it goes on refusing.
"""

PRESETS = {
    "sglang": {
        "program": "SGLang, slime, miles, verl: torch_memory_saver in its preload mode",
        "versions": "0.0.9 and 0.0.10",
        "help": "torch_memory_saver's regions run on this library.",
        "rules": {
            "weights: api": 'what is made in its region "weights"',
            "kv_cache: api": 'what is made in its region "kv_cache"',
            "cuda_graph: api": 'what is made in its region "cuda_graph"',
        },
        "triggers": {
            "torch_memory_saver": (
                "memory_saver_on_us",
                "the package loads this library in place of its own, in new processes too, and does not see "
                "expandable segments, which it would refuse",
            ),
        },
    },
}


def memory_saver_on_us(package, preset, torch):
    entry = sys.modules.get(package.__name__ + ".entrypoint")
    preload = sys.modules.get(package.__name__ + ".hooks.mode_preload")
    cls = getattr(preload, "HookUtilModePreload", None)
    absent = [name for name in ("HookUtilModePreload", "get_binary_path_from_package") if not hasattr(preload, name)]
    if cls is not None:
        absent += ["HookUtilModePreload." + name for name in _absent(cls, ["get_path_binary"])]
    if absent:
        return ["hooks.mode_preload." + name for name in absent]
    _load_us(preload, sys.modules.get(package.__name__ + ".utils"), cls)
    if torch and hasattr(entry, "_sanity_checks"):
        absent = [name for name in ("_TorchMemorySaverImpl", "os") if not hasattr(entry, name)]
        if absent:
            return ["entrypoint." + name for name in absent]
        _do_not_refuse_segments(entry, entry._TorchMemorySaverImpl)
    return []


def _load_us(preload, utils, cls):
    """In the package's own look-up, and in that of slime and miles, who ask for the path to start their actors with it."""
    import pathlib

    real_path = preload.get_binary_path_from_package

    def get_path_binary(self):
        return _library_path(None)

    def get_binary_path_from_package(stem):
        return pathlib.Path(_library_path(None)) if stem.endswith("_preload") else real_path(stem)

    cls.get_path_binary = _dressed(get_path_binary, cls.get_path_binary)
    for module in (preload, utils):
        if hasattr(module, "get_binary_path_from_package"):
            module.get_binary_path_from_package = _dressed(get_binary_path_from_package, real_path)


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
