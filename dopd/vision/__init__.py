"""Vision-language models: processors that need no torchvision, and what a model's images look like to it."""

from dopd.vision.processors import image_only, is_vision_config, load_processor

__all__ = ["image_only", "is_vision_config", "load_processor"]
