"""As much of torch_memory_saver as the preset knows."""
from .entrypoint import TorchMemorySaver
from .hooks.mode_preload import configure_subprocess
