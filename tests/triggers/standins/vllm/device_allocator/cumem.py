"""An allocator of the shape of vLLM's, of the generation that STANDIN_GENERATION names: `refuses` where the
environment has expandable segments on, `switches` by a bare text, `rewrites` the whole configuration."""

import os
from contextlib import contextmanager

import torch

GENERATION = os.environ["STANDIN_GENERATION"]

if GENERATION == "rewrites":
    DEFERRABLE_TAGS = ("weights", "kv_cache")

    def conf_flag_enabled(conf, key):
        return f"{key}:True" in conf


def create_and_map(allocation_handle):
    mapped.append((allocation_handle[2], torch.tag()))


mapped = []


class AllocationData:
    def __init__(self, handle, tag):
        self.handle, self.tag = handle, tag


class CuMemAllocator:
    default_tag = "default"
    instance = None

    def __init__(self):
        conf = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
        if GENERATION == "refuses":
            assert "expandable_segments:True" not in conf
        self.current_tag = self.default_tag
        self.allocator_and_pools = {}
        self.pointer_to_data = {}
        CuMemAllocator.instance = self

    def _segments_on(self):
        if GENERATION == "rewrites":
            return conf_flag_enabled(torch.settings_in_force(), "expandable_segments")
        return GENERATION == "switches" and "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")

    if GENERATION != "renamed":

        @contextmanager
        def use_memory_pool(self, tag=None):
            switch = self._segments_on()
            if switch:
                torch.write_settings("expandable_segments:False")
            self.current_tag = tag or self.default_tag
            self.pointer_to_data[len(self.pointer_to_data)] = AllocationData(
                (0, 2 << 20, len(self.pointer_to_data), 0), self.current_tag
            )
            yield "theirs"
            if switch:
                torch.write_settings("expandable_segments:True")

    def sleep(self, offload_tags=None):
        return "their sleep"

    def wake_up(self, tags=None):
        for data in self.pointer_to_data.values():
            create_and_map(data.handle)
        return "their wake"

    if GENERATION == "rewrites":

        def discard(self, tags):
            return "their discard"

    def get_current_usage(self):
        return -1
