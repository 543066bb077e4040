"""A worker of the shape of vLLM's. That of the generation `switches` asks for max_split_size_mb alone while it loads."""

import os
from contextlib import contextmanager

import torch


class Worker:
    if os.environ["STANDIN_GENERATION"] == "switches":

        @contextmanager
        def _scoped_allocator_max_split(self, max_split_size_mb):
            torch._C._accelerator_setAllocatorSettings(f"max_split_size_mb:{max_split_size_mb}")
            try:
                yield
            finally:
                torch._C._accelerator_setAllocatorSettings("max_split_size_mb:17592186044415")

    else:

        @contextmanager
        def _scoped_allocator_max_split(self, max_split_size_mb):
            original_settings = torch.settings_in_force()
            torch._C._accelerator_setAllocatorSettings(f"{original_settings},max_split_size_mb:{max_split_size_mb}")
            try:
                yield
            finally:
                torch._C._accelerator_setAllocatorSettings(original_settings)

    def load_model(self, make):
        with self._scoped_allocator_max_split(20):
            return make()

    def initialize_from_config(self, make):
        return make()
