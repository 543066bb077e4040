"""As much of torch_memory_saver as the preset knows."""
