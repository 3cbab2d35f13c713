"""Processors of vision-language models without torchvision, which only video needs.

Many processors ask for a video processor, and every video processor of transformers asks for torchvision. `image_only`
makes of such a class one that reads images and text alone; what it saves names the original class, so that the
checkpoint opens wherever the original does.
"""

import functools
import importlib
import importlib.metadata
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from dopd.errors import ModelError
from dopd.remote_code import only_if_asked

INSTALL_TORCHVISION = "pip install torchvision (the build for your torch), or take a model that reads images without it"
_WHERE = ("revision", "token", "cache_dir", "subfolder", "local_files_only")  # arguments that say where files are
_IMAGE, _VIDEO = "image_processor", "video_processor"


class NoVideoProcessor:
    """Stands where a processor looks for its video processor; reading a video with it is an error that says why."""

    num_frames = 1
    fps = 1
    merge_size = 1
    font = ""
    model_input_names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> None:
        # Some processors look a setting of videos up while they are made or saved; images do not depend on it.
        if name.startswith("_"):
            raise AttributeError(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ModelError(f"this processor reads images and text only: videos need torchvision. {INSTALL_TORCHVISION}")


def torchvision_works() -> bool:
    """Whether torchvision can be used.

    Raises:
        ModelError: it is installed and cannot be imported. transformers goes by what is installed, and then reads no
            image at all, with or without torchvision.
    """
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return False
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a build for another torch fails with whatever its libraries raise
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"torchvision {version} is installed but cannot be imported ({words}), and with it there no image "
            "processor of transformers works. pip uninstall torchvision (images do not need it), or install the build "
            "for your torch"
        ) from error
    return True


@functools.cache
def image_only(base: type) -> Any:
    """A subclass of a processor class without its video processor.

    Every other argument of the base's `__init__` keeps its name and its place, because a processor saves what its
    signature names. A base without a video processor is returned as it is.

    Args:
        base (`type`): a subclass of transformers' `ProcessorMixin`, for example `Qwen3VLProcessor`.

    Raises:
        ModelError: the class reads videos and no images.
    """
    whole = inspect.signature(base.__init__)  # type: ignore[misc]
    if _VIDEO not in whole.parameters:
        return base
    if not {_IMAGE, "tokenizer"} <= whole.parameters.keys():
        raise ModelError(
            f"{base.__name__} reads no prompts with images: it has {', '.join(list(whole.parameters)[1:])}"
        )
    parameters = [parameter for name, parameter in whole.parameters.items() if name != _VIDEO]
    signature = whole.replace(parameters=parameters)
    further = next((one.name for one in parameters if one.kind is one.VAR_KEYWORD), None)

    class ImageOnly(base):
        video_processor = NoVideoProcessor()
        video_section: dict[str, Any] | None = None  # of the checkpoint that this processor was read from

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            parts = dict(signature.bind(self, *args, **kwargs).arguments)
            parts.pop("self")
            extra = parts.pop(further, {}) if further else {}
            # The base hands its parts on by place, so meanwhile the video processor has to be one of them.
            own: dict[str, Any] = self.__dict__
            own["get_attributes"] = base.get_attributes  # type: ignore[attr-defined]
            try:
                base.__init__(self, **{_VIDEO: self.video_processor}, **parts, **extra)  # type: ignore[misc]
            finally:
                del own["get_attributes"]
            own.pop(_VIDEO, None)

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == _VIDEO:
                return NoVideoProcessor
            return super().check_argument_for_proper_class(argument_name, argument)

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            # The base reads the names of its arguments off the code object, which here has none.
            kwargs.pop("return_unused_kwargs", None)
            parts = dict(zip(cls.get_attributes(), args, strict=True))
            settings = {**processor_dict, **kwargs}
            named = {name: settings[name] for name in signature.parameters if name in settings and name not in parts}
            processor = cls(**parts, **named)
            processor.video_section = processor_dict.get(_VIDEO)
            return processor

        def to_dict(self) -> dict[str, Any]:
            output = super().to_dict()
            output.pop("video_section", None)
            # Where torchvision is installed the original class reads this section.
            section = self.video_section or _default_video_section(base)
            return output if section is None else {**output, _VIDEO: section}

    # What is saved as `processor_class` is this name: the checkpoint then opens with the original class elsewhere.
    ImageOnly.__name__ = base.__name__
    ImageOnly.__qualname__ = f"image_only({base.__name__})"
    ImageOnly.__init__.__signature__ = signature  # type: ignore[attr-defined]
    return ImageOnly


def _default_video_section(base: type) -> dict[str, Any] | None:
    # The mapping of transformers is emptied where torchvision is missing; the class of that name is still listed.
    name = base.__name__.replace("Processor", "VideoProcessor")
    return {f"{_VIDEO}_type": name} if hasattr(transformers, name) else None


def is_vision_config(config: Any) -> bool:
    """Whether a model with this configuration reads images beside text."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_processor(path: str, **kwargs: Any) -> Any:
    """The processor of a vision-language checkpoint; without torchvision, one for images and text alone.

    Args:
        path (`str`): a hub id or a folder.
        kwargs: as of `AutoProcessor.from_pretrained`, for example `revision`.

    Raises:
        ModelError: torchvision is broken, the checkpoint has no processor or one of an unknown class, or this family
            cannot be read without torchvision or without another package.
    """
    base, kwargs = None, only_if_asked(kwargs)
    try:
        if not torchvision_works():
            base = _base_of(path, kwargs)
        reader = AutoProcessor if base is None else image_only(base)
        processor = reader.from_pretrained(path, **kwargs)
    except (ImportError, ValueError, OSError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"the processor of {path!r} cannot be made: {_advice(error, base)}") from error
    if isinstance(getattr(processor, _VIDEO, None), NoVideoProcessor) and processor.video_section is None:
        processor.video_section = _json_file(path, VIDEO_PROCESSOR_NAME, kwargs)
    return processor


def _base_of(path: str, kwargs: Mapping[str, Any]) -> Any:
    """The class of a checkpoint's processor, found where `AutoProcessor` finds it; `None` leaves it to `AutoProcessor`,
    because the checkpoint brings its own code or transformers has no processor for it.
    """
    for file in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, TOKENIZER_CONFIG_FILE, CONFIG_NAME):
        values = _json_file(path, file, kwargs) or {}
        if "AutoProcessor" in (values.get("auto_map") or {}) and kwargs.get("trust_remote_code"):
            return None
        if name := values.get("processor_class"):
            found = processor_class_from_name(name)
            if found is None:
                raise ModelError(
                    f"{path!r} names {name!r} as the class of its processor, which transformers "
                    f"{transformers.__version__} does not have: update transformers, or set trust_remote_code if the "
                    "checkpoint brings its own code"
                )
            return found
    config = type(AutoConfig.from_pretrained(path, **kwargs))
    return PROCESSOR_MAPPING.get(config, None)


def _json_file(path: str, file: str, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """A file of a checkpoint, or `None` if it has none of that name."""
    found = cached_file(
        path,
        file,
        **{name: kwargs[name] for name in _WHERE if name in kwargs},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def _advice(error: Exception, base: type | None) -> str:
    words = " ".join(str(error).split())
    if "num2words" in words:
        return "it needs num2words: pip install 'dopd[vision]'"
    if "torchvision" in words.lower():
        name = "its family" if base is None else base.__name__
        return f"{name} reads images with torchvision only. {INSTALL_TORCHVISION}"
    return (
        f"{type(error).__name__}: {words[:300]}. A checkpoint of a vision-language model needs its processor beside "
        "it: processor.save_pretrained(folder)"
    )
