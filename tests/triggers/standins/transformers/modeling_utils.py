"""Models."""

from .core_model_loading import load_all


class PreTrainedModel:
    @classmethod
    def from_pretrained(cls, makers):
        return load_all(makers)

    @classmethod
    def _from_config(cls):
        return None

    def to(self):
        return None

    def cuda(self):
        return None
