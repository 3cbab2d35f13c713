"""Rows of a dataset as prompts, and prompts as the token ids and images that models read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dopd.data.control import Markup, check_control_tokens_of_settings
from dopd.data.encode import encode_prompts, encode_view, tokenizer_of
from dopd.data.images import COLUMNS, PRIVILEGED_COLUMN
from dopd.data.options import check_generation_prompt, check_options, check_same_lead
from dopd.data.rendering import asks_text, template_of
from dopd.data.views import (
    PrivilegedTemplate,
    Prompt,
    as_conversations,
    is_blank,
    privileged_prompt,
    privileged_prompts,
)
from dopd.scoring import View
from dopd.sources import PLAIN, REFERENCE_COLUMN
from dopd.step.batch import Rollouts
from dopd.tables import RoutingTable

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PromptEncoder:
    """How a run writes and reads prompts; the same object encodes for rollouts, scores, evaluation and inspection.

    Attributes:
        processing_class: a tokenizer, or the processor of a vision-language model.
        template (`PrivilegedTemplate`): where privileged context goes.
        chat_template_kwargs (`dict`): arguments of `apply_chat_template`, for example `{"enable_thinking": False}`.
        prompt_format (`str`): what a prompt that is text means, as in `DOPDConfig`: `"auto"` or `"text"`.
        teacher_processing_class (*optional*): of a teacher that encodes prompts or images otherwise.
        teacher_chat_template_kwargs (`dict`, *optional*): what that teacher's template is told; as the student's if
            left out.
        pad_to_multiple_of (`int`, *optional*): the number of completion tokens is rounded up to a multiple of it.
    """

    processing_class: Any
    template: PrivilegedTemplate = field(default_factory=PrivilegedTemplate)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    prompt_format: str = "auto"
    teacher_processing_class: Any = None
    teacher_chat_template_kwargs: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.processing_class)

    @cached_property
    def asks_text(self) -> bool:
        """Whether a prompt that is text is asked as a user's turn."""
        return asks_text(self.processing_class, self.chat_template_kwargs, self.prompt_format)

    @property
    def markup(self) -> Markup:
        """What would act as markup in the texts of a row."""
        return Markup.of(self.tokenizer, template_of(self.processing_class, self.chat_template_kwargs))

    @property
    def processing_classes(self) -> list[Any]:
        """Whose chat templates receive `chat_template_kwargs`."""
        teachers = self.teacher_processing_class if self.teacher_chat_template_kwargs is None else None
        return [one for one in (self.processing_class, teachers) if one is not None]

    @property
    def teacher_options(self) -> dict[str, Any]:
        """What chat templates are told for the teacher."""
        own = self.teacher_chat_template_kwargs
        return self.chat_template_kwargs if own is None else own

    def check_settings(self) -> list[str]:
        """What is worth telling of the settings of prompts, one sentence each.

        Raises:
            ConfigError: they would act as markup, or name nearly what a chat template reads.
        """
        options, markup = self.chat_template_kwargs, self.markup
        check_control_tokens_of_settings(self.template, options, markup, chat=self.asks_text)
        ending = check_generation_prompt(self.processing_class, options, markup.closing) if self.asks_text else []
        return [*check_options(self.processing_classes, options), *ending, *self._check_teachers_settings()]

    def _check_teachers_settings(self) -> list[str]:
        if self.teacher_chat_template_kwargs is None:
            return []
        teachers, options = self.teacher_processing_class or self.processing_class, self.teacher_options
        markup = Markup.of(tokenizer_of(teachers), template_of(teachers, options))
        setting = "teacher_chat_template_kwargs"
        check_control_tokens_of_settings(self.template, options, markup, chat=self.asks_text, setting=setting)
        check_same_lead(self.processing_class, self.chat_template_kwargs, teachers, options)
        return check_options([teachers], options, setting)

    def asked(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The rows with prompts that are text as a user's turn, where they are asked so."""
        return as_conversations(rows) if self.asks_text else list(map(dict, rows))

    def asked_row(self, row: Row) -> dict[str, Any]:
        """One row, asked."""
        return self.asked([row])[0]

    def read_by_student(self, rows: Sequence[Row], table: RoutingTable) -> list[dict[str, Any]]:
        """The rows, asked, with the prompt that the student answers and is trained on."""
        asked = self.asked(rows)
        if table.student_view == PLAIN:
            return asked
        # The prompt has the row's images in it then.
        without_images = dict.fromkeys((*COLUMNS, PRIVILEGED_COLUMN))
        return [row | without_images | {"prompt": privileged_prompt(row, self.template)} for row in asked]

    def encode(self, prompts: list[Prompt]) -> list[list[int]]:
        """Token ids of prompts."""
        return encode_prompts(self.processing_class, prompts, self.chat_template_kwargs)

    def view(self, prompts: list[Prompt], device: Any) -> View:
        """Prompts as the student's processor encodes them, padded, with images beside them."""
        return encode_view(self.processing_class, prompts, self.chat_template_kwargs, device)

    def shared_view(self, prompts: list[Prompt], device: Any) -> View:
        """Prompts for student and teacher: `for_teacher` is what a teacher with a processor of its own reads."""
        view = self.view(prompts, device)
        if self.teacher_processing_class is None:
            return view
        own = encode_view(self.teacher_processing_class, prompts, self.teacher_options, device)
        return replace(view, for_teacher=own)

    def privileged_view(self, rows: Sequence[Row], device: Any) -> View:
        """Rows that are asked, as everyone reads their prompts with privileged context."""
        return self.shared_view(privileged_prompts(rows, self.template), device)

    def padded(
        self, answers: Sequence[Sequence[int]], device: Any, logprobs: Sequence[Sequence[float]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Answers as ids (B, T), padded on the right, their mask (B, T), and log-probs of their tokens (B, T)."""
        longest = max(1, *map(len, answers))
        multiple = self.pad_to_multiple_of or 1
        longest = -(-longest // multiple) * multiple
        pad = self.tokenizer.pad_token_id
        ids = [[*answer, *[pad] * (longest - len(answer))] for answer in answers]
        mask = [[1] * len(answer) + [0] * (longest - len(answer)) for answer in answers]
        numbers = None
        if logprobs is not None:
            rows = [[*values, *[0.0] * (longest - len(values))] for values in logprobs]
            numbers = torch.tensor(rows, device=device)
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device), numbers

    def reference(self, row: Row) -> list[int]:
        """Token ids of the reference text of a row, without an end; none where it has none."""
        text = row.get(REFERENCE_COLUMN)
        return [] if is_blank(text) else list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def texts(self, rollouts: Rollouts) -> list[str]:
        """The answers of rollouts as texts, without special tokens."""
        return [self.text(ids) for ids in rollouts.answers] if rollouts.texts is None else rollouts.texts

    def text(self, ids: Sequence[int]) -> str:
        """A completion as text, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)
