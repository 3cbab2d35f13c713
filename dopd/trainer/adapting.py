"""What a student with adapters, or with quantised weights, needs before the first step."""

import copy
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor
from trl.trainer.utils import create_model_from_path

from dopd.adapters import check_adapter_config, check_patterns, has_adapters, tuned_layers, without_adapters
from dopd.checkpoints import adapter_place, config_of, family_of, files_of, load, origin_of, reason_of, where_of
from dopd.errors import ConfigError, DopdError, ModelError, did_you_mean, first_line
from dopd.quantized import is_quantized, packed_by
from dopd.remote_code import only_if_asked
from dopd.rollout_settings import asking
from dopd.sampling import declared_ends
from dopd.scoring import evaluation_mode
from dopd.settings import as_mapping
from dopd.trainer.config import DOPDConfig
from dopd.trainer.guards import active_dropout, disable_dropout_numbers
from dopd.trainer.passes import check_self_divergence, self_divergence
from dopd.trainer.teachers import ParkedTeachers, field
from dopd.weights import REPORTING, whole

_NOISE = 0.01
WHERE_NOISE = "in the trained view alone: rollouts, and every view that is scored, run without it"


def check_configs(model: Any, peft_config: Any, args: DOPDConfig) -> None:
    """Refuse adapters that cannot be trained here, before anything is loaded.

    Args:
        model: what the trainer was given as the student.
        peft_config: a new adapter for it, if any.
        args (`DOPDConfig`): the config.
    """
    present = dict(model.peft_config) if has_adapters(model) else {}
    for config in [*present.values(), peft_config, named_adapter(model, args)]:
        if config is not None:
            check_adapter_config(config)
    if len(present) > 1:
        raise ConfigError(
            f"the student has the adapters {', '.join(present)}, and a saved folder does not say which of them act, so "
            "that it would open as another model. Keep one: model.delete_adapter(name) for those that do not act, "
            "model.merge_and_unload() before the one that trains is added for those that do"
        )
    if has_adapters(model) and not any(weight.requires_grad for weight in model.parameters()):
        raise ConfigError(
            "the student's adapter is frozen (it was loaded for inference), so nothing would train: load it with "
            "PeftModel.from_pretrained(base, folder, is_trainable=True), or name its folder as the student"
        )


def named_adapter(model: Any, args: DOPDConfig) -> Any:
    """The configuration of an adapter that is named by its folder; `None` for anything else."""
    if not isinstance(model, str):
        return None
    place = adapter_place(model, **where_of({**_where(args), **as_mapping(args.model_init_kwargs)}))
    if place is None:
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(str(place))


def on_revision(peft_config: Any, model: Any, options: Mapping[str, Any]) -> Any:
    """A new adapter's configuration that says which revision of its base is meant: another one is another model.

    Args:
        peft_config: the configuration, or `None`.
        model: the student, or its name.
        options: what `from_pretrained` is given for it.
    """
    revision = options.get("revision")
    if peft_config is None or revision is None or not isinstance(model, str):
        return peft_config
    if origin_of(model, **where_of(options)) is not None:  # merged into its base, which names the adapter
        return peft_config
    peft_config = copy.copy(peft_config)  # a caller's own may be used again
    peft_config.revision = revision
    return peft_config


def read(
    model: Any,
    teacher_model: Any,
    args: DOPDConfig,
    *,
    processing_class: Any,
    peft_config: Any,
    quantization_config: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """Student, teacher, configuration and tokenizer for the host: what is named is loaded here, adapters (which the
    host cannot read) with their bases, and checked to be whole.

    The student's adapter goes on training; with a new `peft_config` it becomes part of the weights below the new one.
    """
    args = copy.copy(args)
    args.generation_kwargs = asking(args.generation_kwargs)  # the host would give some of the others twice
    if isinstance(model, str):
        options = {**_where(args), **as_mapping(args.model_init_kwargs)}
        adapter = origin_of(model, **where_of(options)) is not None
        if processing_class is None:
            processing_class = _processing_class(model, options)
        if adapter:
            options = {"dtype": "float32", **options}
            with _readable("model", model, args.model_init_kwargs):
                model = load(model, trainable=True, merged=peft_config is not None, **options)
            args.model_init_kwargs = None
        elif quantization_config is None:
            with _readable("model", model, args.model_init_kwargs):
                model = _checked(model, args, options)
            args.model_init_kwargs = None
    if isinstance(teacher_model, str):
        teacher_model = read_teacher("teacher_model", teacher_model, args)
        args.teacher_model_init_kwargs = None
    if isinstance(model, nn.Module):
        _check_trains(model, peft_config)
        declared_ends(model)  # the host trusts them
        check_patterns(peft_config, [name for name, _ in model.named_modules()])
    return model, teacher_model, args, processing_class


def read_teacher(name: str, path: str, args: DOPDConfig) -> Any:
    """A teacher that is named, loaded as the config says, an adapter with its base.

    Args:
        name (`str`): what names it, for messages.
        path (`str`): a hub id or a folder.
        args (`DOPDConfig`): the run.

    Raises:
        ModelError: it cannot be read.
    """
    options = {**_where(args), **as_mapping(args.teacher_model_init_kwargs)}
    if args.teacher_model_revision is not None:
        options.setdefault("revision", args.teacher_model_revision)
    with _readable(name, path, args.teacher_model_init_kwargs):
        if origin_of(path, **where_of(options)) is not None:
            return load(path, **options).requires_grad_(False)
        # Unlike a student, a teacher has its checkpoint's precision unless it is said.
        return _checked(path, args, {"dtype": None, **options})


def parked(models: Mapping[str, Any], args: DOPDConfig) -> ParkedTeachers:
    """Several teachers, loaded where they are names, and parked."""
    loaded = {
        name: read_teacher(field(name), model, args) if isinstance(model, str) else model
        for name, model in models.items()
    }
    return ParkedTeachers(loaded, args.device)


def _check_trains(model: Any, peft_config: Any) -> None:
    """Refuse a student whose own weights would train, and are packed."""
    if getattr(model, "is_quantized", False) and not has_adapters(model) and peft_config is None:
        method = packed_by(model.config)
        raise ConfigError(
            f"model (={model.name_or_path!r}) has packed weights (quantization_config.quant_method={method!r} in its "
            "config.json), which cannot train: set use_peft=true (peft_config in Python) to train an adapter on them, "
            "or take the same model unpacked"
        )


@contextmanager
def _readable(name: str, path: str, arguments: Any) -> Iterator[None]:
    """Inside, what transformers says of a checkpoint or of arguments becomes a `ModelError` with the field."""
    try:
        yield
    except DopdError:
        raise
    except Exception as error:
        owner = "teacher_" if name.startswith("teacher_") else ""
        with_arguments = f" with {owner}model_init_kwargs" if as_mapping(arguments) else ""
        reason = reason_of(error, path, **where_of(as_mapping(arguments)))
        raise ModelError(f"{name} (={path!r}) cannot be read{with_arguments}: {reason}") from error


def _checked(path: str, args: DOPDConfig, options: dict[str, Any]) -> Any:
    """A whole model as the host would load it, and every weight of it the checkpoint's."""
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    # The host would look for the class at the main revision.
    family = family_of(path, **where_of(options))
    loaded: Any = create_model_from_path(path, family, **only_if_asked(options), **REPORTING)
    return whole(path, *loaded)


def _processing_class(path: str, options: dict[str, Any]) -> Any:
    path, where = files_of(path, **where_of(options))
    return AutoProcessor.from_pretrained(path, truncation_side="left", padding_side="left", **where)


@contextmanager
def peft_errors(model: Any, peft_config: Any) -> Iterator[None]:
    """Inside, what PEFT (or the host, of an adapter) raises becomes a `ConfigError` that names the field and a way out.

    Args:
        model: the student.
        peft_config: a new adapter for it, if any.
    """
    try:
        yield
    except Exception as error:
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        by_peft = any(name.split(".")[0] == "peft" for name in frames) or "PEFT adapter" in str(error)
        if peft_config is None or isinstance(error, DopdError) or not by_peft:
            raise
        kind = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
        raise ConfigError(
            f"peft_config: {kind} cannot be put on {type(model).__name__} ({' '.join(str(error).split())[:300]})"
            + _other_targets(model, peft_config)
        ) from error


def _other_targets(model: Any, peft_config: Any) -> str:
    """What to name in place of layers that other parts of a model have too, of kinds that no adapter knows."""
    targets = getattr(peft_config, "target_modules", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    place = next((name for name, module in model.named_modules() if module is decoder), "") if decoder else ""
    if isinstance(targets, str) or not targets or place.count(".") < 1:
        return ""
    pattern = rf"{re.escape(place)}\..*\.({'|'.join(sorted(targets))})"
    return (
        f". To leave out what stands beside the language model, take {pattern!r} as target_modules "
        "(lora_target_modules in a config file)"
    )


def check_names(student: Any, peft_config: Any) -> None:
    """Refuse a new adapter with names that nothing in the student has: PEFT leaves them out without a word.

    Raises:
        ConfigError: the field, the name, and names that are like it.
    """
    if not has_adapters(student):
        return
    places = [name for name, _ in [*student.named_modules(), *student.named_parameters()]]
    places = [name.replace(".base_layer", "").replace(".original_module", "") for name in places]
    ends = {part for name in places for part in name.split(".") if not part.isdigit()}
    for setting in ("target_modules", "modules_to_save", "target_parameters"):
        names = getattr(peft_config, setting, None)
        for name in [] if names is None or isinstance(names, str) else names:
            if any(place == name or place.endswith(f".{name}") for place in places):
                continue
            hint = did_you_mean(name.split(".")[-1], sorted(ends))
            raise ConfigError(f"peft_config: {setting} names {name!r}, and nothing in the student is called so.{hint}")


def _where(args: DOPDConfig) -> dict[str, Any]:
    return {"trust_remote_code": True} if args.trust_remote_code else {}


def prepare(student: Any, *, half: bool, whole: bool) -> None:
    """Make an adapter's base pass gradients on, and try that the adapter acts where the loss is computed.

    Args:
        student: the unwrapped student.
        half (`bool`): whether it computes in half precision.
        whole (`bool`): whether this process holds every weight whole.

    Raises:
        ModelError: PEFT cannot run this adapter on these weights, or the loss would not see it.
    """
    if not whole or not has_adapters(student):
        return
    check_added_rows(student)
    config = next(iter(student.peft_config.values()))
    kind = "DoRA" if getattr(config, "use_dora", False) else str(config.peft_type.value)
    with evaluation_mode(student):
        try:
            self_divergence(student)
        except Exception as error:  # each adapter fails in its own way on weights that it was not made for
            packed = " on quantised weights" if any(map(is_quantized, student.modules())) else ""
            raise ModelError(
                f"PEFT cannot run {kind}{packed} ({type(error).__name__}: {first_line(error)}): use plain LoRA"
                + (", or load the student without quantisation" if packed else "")
            ) from error
        kept = _disturb(student)
        try:
            check_self_divergence(f"model with {kind}", student, half=half)
        finally:
            with torch.no_grad():
                for weight, value in kept:
                    weight.copy_(value)


def check_added_rows(student: Any) -> None:
    """Refuse embeddings that were resized under an adapter where a saved folder would not hold them all: PEFT leaves
    out a head of its own beside a tuned input, and both of them where the vocabulary is part of a nested configuration.

    Raises:
        ConfigError: what would be lost, and two ways out.
    """
    inner = without_adapters(student)
    base = getattr(next(iter(student.peft_config.values())), "base_model_name_or_path", None)
    try:
        before = config_of(base).get_text_config().vocab_size if base else None
    except Exception:  # a model that was never saved, or is out of reach
        before = None
    head, embeddings = inner.get_output_embeddings(), inner.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if before is None or before == rows:
        return
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are said when it is saved
        saved = get_peft_model_state_dict(student)
    wanted = [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
    names = [name for name, module in student.named_modules() if any(module is other for other in wanted)]
    held = {name for name in names for key, value in saved.items() if key.startswith(name) and rows in value.shape[:1]}
    lost = [name.removeprefix("base_model.model.") for name in names if name not in held]
    if lost:
        raise ConfigError(
            f"the student has embeddings of {rows} rows, and its checkpoint {base!r} has {before}: a saved adapter "
            f"would not hold the rows of {', '.join(lost)}, and the folder would open as another model. Save the "
            "resized model with its tokenizer, load it from there and put the adapter on that, or name "
            f"{', '.join(sorted({name.split('.')[-1] for name in lost}))} in modules_to_save"
        )


@torch.no_grad()
def _disturb(student: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Move the adapters a little: fresh ones do nothing, wherever they are read or missed. Returns what they were."""
    generator = torch.Generator().manual_seed(0)
    kept = []
    for layer in tuned_layers(student).values():
        of_base = {id(weight) for weight in layer.get_base_layer().parameters()}
        for weight in layer.parameters():
            if weight.requires_grad and id(weight) not in of_base:
                kept.append((weight, weight.clone()))
                noise = torch.randn(weight.shape, generator=generator)
                weight += _NOISE * noise.to(weight.device, weight.dtype)
    return kept


def keep_adapter_dropout(student: Any) -> dict[str, float]:
    """Switch an adapter's dropout on again, which was asked for by name; the host switched it off with the model's.

    Returns:
        By the names of `peft_config`, those that act.
    """
    acting: dict[str, float] = {}
    if not has_adapters(student):
        return acting
    for layer in tuned_layers(student).values():
        for name, modules in layer._modules.items():
            for adapter, module in modules.items() if isinstance(modules, nn.ModuleDict) else ():
                asked = getattr(student.peft_config.get(adapter), name, None)
                if isinstance(module, nn.Dropout) and asked:
                    module.p = acting[name] = float(asked)
    return acting


def dropout_notes(student: Any, *, disable: bool) -> list[str]:
    """Switch off the dropout that nobody asked for, if any is to go; say what acts."""
    if disable:
        disable_dropout_numbers(student)
        asked = keep_adapter_dropout(student)
        return [f"{name} (={value:g}) acts {WHERE_NOISE}" for name, value in asked.items()]
    dropout = active_dropout(student)
    if not dropout:
        return []
    return [
        f"dropout is active in {len(dropout)} modules of the student (first: {dropout[0]}): it acts {WHERE_NOISE}, so "
        "gaps and targets differ by its noise. disable_dropout=True avoids that"
    ]
