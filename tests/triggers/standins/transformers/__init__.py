"""As much of transformers as the preset knows."""

__version__ = "0.0.1"
