"""The preset for Hugging Face transformers.

Its loader of 5.0 and later hands tensors to threads that are in no region, and reserves the model's size ahead where only
the region's thread can use it. So under the preset it reads one tensor after the other, as with
HF_DEACTIVATE_ASYNC_LOAD.
"""

PRESETS = {
    "transformers": {
        "program": "Hugging Face transformers",
        "versions": "4.57 to 5.24",
        "help": "Models are weights, the tensors of key-value caches kv_cache.",
        "rules": {
            "weights: python(transformers.modeling_utils:PreTrainedModel.from_pretrained)": "models that are loaded",
            "weights: python(transformers.modeling_utils:PreTrainedModel._from_config)": "models that are made, by "
            "AutoModel.from_config too",
            "weights: python(transformers.modeling_utils:PreTrainedModel.to)": "models that are moved to the GPU",
            "weights: python(transformers.modeling_utils:PreTrainedModel.cuda)": "the same",
            "kv_cache: python(transformers.cache_utils:DynamicLayer.update)": "caches that grow with each token",
            "kv_cache: python(transformers.cache_utils:DynamicSlidingWindowLayer.update)": "the same with a window",
            "kv_cache: python(transformers.cache_utils:QuantizedLayer.update)": "quantized caches",
            "kv_cache: python(transformers.cache_utils:StaticLayer.lazy_initialization)": "caches of a fixed size",
        },
        "rules of some versions": {
            "kv_cache: python(transformers.cache_utils:Fp8QuantizedLayer.update)": "caches in 8-bit floating point",
            "kv_cache: python(transformers.cache_utils:LinearAttentionLayer.lazy_initialization)": "states of linear "
            "attention",
            "kv_cache: python(transformers.cache_utils:LinearAttentionLayer.update_conv_state)": "the same where past "
            "states are recorded",
            "kv_cache: python(transformers.cache_utils:DynamicIndexedLayer.update_indexer)": "keys of sparse attention's "
            "indexer",
            "kv_cache: python(transformers.cache_utils:StaticIndexedLayer.lazy_initialization_indexer)": "the same in "
            "caches of a fixed size",
        },
        "triggers": {
            "transformers.modeling_utils": (
                "transformers_loads_on_one_thread",
                "the loader of 5.0 and later does not hand tensors to other threads, which would be in no region",
            ),
        },
    },
}


def transformers_loads_on_one_thread(modeling_utils, preset, torch):
    loader = sys.modules.get("transformers.core_model_loading")
    if loader is None:  # before 5.0
        return []
    if not hasattr(loader, "ThreadPoolExecutor"):
        return ["core_model_loading.ThreadPoolExecutor"]
    loader.ThreadPoolExecutor = lambda *args, **kwargs: None  # as it has none where it reads in order
    return []
