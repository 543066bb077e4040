"""The preset for Hugging Face transformers."""

PRESETS = {
    "transformers": {
        "program": "Hugging Face transformers",
        "versions": "4.57 to 5",
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
        "triggers": {},
    },
}
