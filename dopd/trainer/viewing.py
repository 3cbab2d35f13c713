"""The part of the trainer that knows what models read: prompts and images as views, rollouts, hidden states."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import unwrap_model_for_generation

from dopd.data.encode import encode_prompts, encode_view, image_sources, reads_images
from dopd.data.images import open_image
from dopd.data.privileged import PrivilegedTemplate, Prompt
from dopd.data.rendering import Markup, asks_text, template_of
from dopd.data.views import as_conversation, plain_prompt, privileged_prompt
from dopd.errors import ScoringError
from dopd.generation import answers
from dopd.lengths import is_first_regime
from dopd.prefix import architecture, hidden_states_sharing_prompts
from dopd.sampling import (
    Ending,
    check_ids,
    declared_stop_strings,
    off_policy_settings,
    rollout_settings,
    sampling_config,
)
from dopd.scoring import Balance, View, evaluation_mode, generation_inputs, unpadded, view_hidden_states
from dopd.trainer import images
from dopd.trainer.rollouts import check_frequencies
from dopd.trainer.saving import SavingTrainer
from dopd.vision.media import FeatureCache
from dopd.vision.tokens import placeholder_ids

logger = logging.getLogger(__name__)

_OF_LAYERS = ("every_n_layers", "offload")  # of checkpointing: what is transformers' own beside torch's arguments
_TYPES = "types/"  # of a batch: token types, before their name
_IMAGES = "images"


class ViewingTrainer(SavingTrainer):
    """Encodes rows as views, draws rollouts from the plain view, and reads hidden states behind any view.

    Every prompt is encoded here, once, text or images: what the student answers is then what it is trained on. The
    host's own rendering would read other columns, and has no place for a second view.
    """

    args: Any
    template: PrivilegedTemplate
    sharing_architectures: frozenset[type]
    ending: Ending
    processing_class: Any
    chat_template_kwargs: dict[str, Any]

    @property
    def unwrapped_student(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def unwrapped_teacher(self) -> Any:
        """The teacher, or `None` where the table reads none."""
        return None if self.teacher_model is None else self.accelerator.unwrap_model(self.teacher_model)

    def _prepare_sampling(self) -> None:
        """Settle what rollouts are drawn from, and what ends them; nothing of it is the checkpoint's but the ends."""
        strings = declared_stop_strings(self.accelerator.unwrap_model(self.model), self.args.generation_kwargs)
        self.ending = Ending(self.eos_token_ids, strings, self._tokenizer)
        if strings:
            logger.warning(f"answers end at {', '.join(map(repr, strings))} as well as at end-of-sequence tokens")
        settings = rollout_settings(self.args)
        off = off_policy_settings(self.args)
        if off:
            named = ", ".join(f"{name}={value!r}" for name, value in off.items())
            logger.warning(
                f"off_policy_rollouts: answers are drawn with {named}, and scored by the student's whole distribution "
                f"at temperature {self.temperature:g}"
            )
        if self.use_vllm:
            if strings:
                stops = {"stop": list(strings), "include_stop_str_in_output": True}
                self.vllm_generation.generation_kwargs = {**(self.vllm_generation.generation_kwargs or {}), **stops}
            return
        self.generation_config = sampling_config(
            self.ending,
            max_new_tokens=int(self.max_completion_length or 0),  # the config has checked it
            pad_token_id=self._tokenizer.pad_token_id,
            sampled=True,
            temperature=self.temperature,
            **settings,
        )

    def _prepare_viewing(self) -> None:
        """Try what can be shared, on prompts with images if the model reads any. Datasets are prepared before."""
        self.features = FeatureCache()
        self.teacher_processor: Any = None
        self._rollout_view: View | None = None
        self._rollout_for_teacher: View | None = None
        self._rollout_pictures: list[Any] | None = None
        self._trial: View | None = None
        images.forbid_placeholders(self)
        # Without a template no prompt can hold an image.
        if reads_images(self.processing_class) and template_of(self.processing_class, self.chat_template_kwargs):
            prompts = images.trial_prompts(self)
            self._trial = self.view_of(prompts)
            self.teacher_processor = images.teacher_processor(self, self._trial)
            self._trial = self.view_of(prompts)
        self.image_architectures = images.architectures(self)

    def trial_view(self, *, teacher: bool) -> View | None:
        """Three prompts with images to try a model with, two of them equal; `None` where the models read text."""
        return self._trial.for_teacher or self._trial if teacher and self._trial is not None else self._trial

    # --- Encoding

    @property
    def asks_text(self) -> bool:
        """Whether a prompt that is text is asked as a user's turn."""
        return asks_text(self.processing_class, self.chat_template_kwargs, self.args.prompt_format)

    @property
    def markup(self) -> Markup:
        """What would act as markup in the texts of a row."""
        return Markup.of(self._tokenizer, template_of(self.processing_class, self.chat_template_kwargs))

    def asked(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with a prompt that is text as a user's turn, where it is asked so."""
        return as_conversation(dict(row)) if self.asks_text else dict(row)

    def encode(self, prompts: list[Prompt]) -> list[list[int]]:
        """Token ids of prompts."""
        return encode_prompts(self.processing_class, prompts, self.chat_template_kwargs)

    def view_of(self, prompts: list[Prompt]) -> View:
        """Prompts as a view: `encode` padded, with images beside it."""
        view = encode_view(self.processing_class, prompts, self.chat_template_kwargs, self.accelerator.device)
        check_ids(view.prompt_ids, self.accelerator.unwrap_model(self.model))
        if self.teacher_processor is None:
            return view
        own = encode_view(self.teacher_processor, prompts, self.chat_template_kwargs, self.accelerator.device)
        return replace(view, for_teacher=own)

    def _privileged_view(self, rows: Sequence[Mapping[str, Any]]) -> View:
        return self.view_of([privileged_prompt(row, self.template) for row in rows])

    def plain_view(self, batch: Mapping[str, Any]) -> View:
        """The student's plain view of a (micro-)batch."""
        types = {name.removeprefix(_TYPES): value for name, value in batch.items() if name.startswith(_TYPES)}
        return View(batch["prompt_ids"], batch["prompt_mask"], tuple(batch.get(_IMAGES, ())), types)

    def rollout_view(self, batch: Mapping[str, Any]) -> View:
        """The plain view of a whole batch, fresh from its rollouts, for every model that scores it."""
        return replace(self.plain_view(batch), for_teacher=self._rollout_for_teacher)

    # --- Rollouts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The host's batch of rollouts, with what `plain_view` reads in it."""
        self.features.clear()  # the weights may have changed since
        prompts = [plain_prompt(row) for row in inputs]
        view = self._rollout_view = self.view_of(prompts)
        self._rollout_for_teacher = view.for_teacher
        if self.use_vllm:
            pictures = [[open_image(source) for source in image_sources(prompt)] or None for prompt in prompts]
            self._rollout_pictures = pictures if any(pictures) else None
        try:
            # The hooks below take the place of whatever the host makes of these prompts.
            batch = super()._generate_and_score_completions([{"prompt": ""}] * len(inputs))
        finally:
            self._rollout_view = None
        self._check_rollouts(batch, view)
        batch |= {"prompt_ids": view.prompt_ids, "prompt_mask": view.prompt_mask}
        if view.images:
            batch[_IMAGES] = list(view.images)
        return batch | {_TYPES + name: value for name, value in view.token_types.items()}

    def _check_rollouts(self, batch: Mapping[str, Any], view: View) -> None:
        """Raise `ScoringError` unless the plain view was answered, with tokens that are scored as they were drawn."""
        asked = unpadded(view.prompt_ids, view.prompt_mask)
        if asked != unpadded(batch["prompt_ids"], batch["prompt_mask"]):
            raise ScoringError("the prompts that were answered are not those of the plain view, token for token")
        forbidden = torch.tensor(placeholder_ids(self.accelerator.unwrap_model(self.model).config))
        if bool(torch.isin(batch["completion_ids"].cpu(), forbidden).any()):
            raise ScoringError(
                "a completion holds a token that stands for an image, which cannot be scored: the engine that sampled "
                "it ignores the list of forbidden tokens. Use use_vllm=False, or an engine that knows logit_bias"
            )
        if not self.args.off_policy_rollouts:
            check_frequencies(self.accelerator.unwrap_model(self.model), batch)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        view = self._rollout_view
        assert view is not None, "prompts are encoded by _generate_and_score_completions"
        return unpadded(view.prompt_ids, view.prompt_mask), None, {}

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, *options: Any, **named: Any
    ) -> list[list[int]]:
        view = self._rollout_view
        assert view is not None, "prompts are encoded by _generate_and_score_completions"
        if self.use_vllm:
            drawn_ids = super()._generate_single_turn(prompt_ids, self._rollout_pictures, {}, *options, **named)
            return [self.ending.cut(ids) for ids in drawn_ids]

        def inputs(part: View) -> Mapping[str, Any]:
            with self.accelerator.autocast():
                once = architecture(model) in self.image_architectures
                return generation_inputs(model, part, cache=self.features, as_features=once)

        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        # Dropout would make the student another model at every token.
        with self.generating_model() as model, evaluation_mode(model), torch.no_grad():
            return answers(model, view, self.generation_config, self.ending, inputs=inputs, alone=sharded)

    @contextmanager
    def generating_model(self) -> Iterator[Any]:
        """The student with whole parameters, ready for `generate`."""
        given: dict[str, Any] = dict(self.args.gradient_checkpointing_kwargs or {})
        of_layers = {name: given.pop(name) for name in _OF_LAYERS if name in given}
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=given or None,  # without any, the host has its own
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield model
        if of_layers and self.args.gradient_checkpointing:  # the host has switched it on for every layer
            model.gradient_checkpointing_disable()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given or None, **of_layers)

    # --- Hidden states

    @contextmanager
    def other_weights(self) -> Iterator[None]:
        """Image features made in here, while other weights stand in the student's place, are not the student's."""
        students, self.features = self.features, FeatureCache()
        try:
            yield
        finally:
            self.features = students

    def view_hidden_states(
        self, model: Any, view: View, completion_ids: Tensor, mask: Tensor, *, balance: Balance | None = None
    ) -> Tensor:
        """Last hidden states (B, T, H) of a view; each different prompt is run once where the model allows it, and each
        different image encoded once.

        In mixed precision they come in the precision that the head computes in; norms would leave them in float32.

        Args: as the function `view_hidden_states`. A load-balancing loss is of whole sequences, so for it nothing is
        shared.
        """
        if view.for_teacher is not None and model is self.accelerator.unwrap_model(self.teacher_model):
            view = view.for_teacher
        # Checkpointed layers keep no keys and values.
        checkpointed = model.training and self.args.gradient_checkpointing
        shares = architecture(model) in self.sharing_architectures and not checkpointed and balance is None
        longest = int(view.prompt_lengths.max()) + completion_ids.shape[1]
        with self.accelerator.autocast():
            if shares and is_first_regime(model.config, longest):
                hidden = hidden_states_sharing_prompts(model, view, completion_ids, mask, cache=self.features)
            else:
                once = architecture(model) in self.image_architectures
                options: dict[str, Any] = {"cache": self.features, "as_features": once, "balance": balance}
                hidden = view_hidden_states(model, view, completion_ids, mask, **options)
            return self._in_head_precision(hidden)

    def _in_head_precision(self, hidden: Tensor) -> Tensor:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return hidden if half is None else hidden.to(half)
