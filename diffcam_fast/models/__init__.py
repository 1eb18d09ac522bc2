"""The embedded default model, loaders for other people's, and the photos to try them on."""

from diffcam_fast.models.efficientnet_lite import EfficientNetLite0, load_efficientnet_lite0
from diffcam_fast.models.imagenet_classes import class_name, find_class, imagenet_labels
from diffcam_fast.models.loading import LoadedModel, load_model
from diffcam_fast.models.photos import PhotoError, read_photo
from diffcam_fast.models.preprocessing import Preprocessing

__all__ = [
    "EfficientNetLite0",
    "LoadedModel",
    "PhotoError",
    "Preprocessing",
    "class_name",
    "find_class",
    "imagenet_labels",
    "load_efficientnet_lite0",
    "load_model",
    "read_photo",
]
