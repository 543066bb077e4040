"""What programs of the GPU tests see of PyTorch's allocator."""
import threading

import torch

KEYS = ("expandable_segments", "max_split_size", "garbage_collection_threshold", "roundup_power2_divisions")


def settings():
    """Those of KEYS, as they are in force for this thread."""
    now = torch.cuda.memory._snapshot()["allocator_settings"]
    return {key: now.get(key) for key in KEYS}


def segment_is_expandable(tensor, segments):
    address = tensor.data_ptr()
    for segment in segments:
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            return segment["is_expandable"]
    raise AssertionError("the tensor lies in no segment")


def on_thread(function):
    """Its result, from a thread of its own."""
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]
