"""Who refuses expandable segments."""
import os


class TorchMemorySaver:
    def __init__(self):
        self._impl, self._named = None, {}

    def use(self, **named):
        self._impl = _TorchMemorySaverImpl(**named)


class _TorchMemorySaverImpl:
    def __init__(self, hook_mode="preload"):
        self.hook_mode = hook_mode
        _sanity_checks()


def _sanity_checks():
    if "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        raise RuntimeError("expandable segments are not supported")
