"""Control tokens in what people bring: text that a tokenizer reads as markup, which would close a turn or open one."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dopd.data.blocks import blocks_of, is_image, texts_of
from dopd.data.checks import TEXT_COLUMNS
from dopd.data.rendering import rendered_trial
from dopd.data.views import TEMPLATE_COLUMN, PrivilegedTemplate, Prompt, lacks_privileged, row_options
from dopd.errors import ConfigError, DataError, cut

_USERS_TEXT = "first trial block"


@dataclass(frozen=True)
class Markup:
    """What would act as markup in the text of a turn, worked out once for many texts.

    Attributes:
        tokenizer: reads texts.
        tokens (`dict[str, int]`): its special tokens, by their text.
        brackets (`frozenset[str]`): what its chat template writes around a user's turn in brackets (`[/INST]`).
        pattern (`re.Pattern`, *optional*): finds any of these; `None` where there are none.
        ends (`re.Pattern`, *optional*): finds what ends an assistant's turn, which may hold other markup: calls of
            tools, thoughts.
        closing (`str`, *optional*): what the chat template writes first behind an answer.
    """

    tokenizer: Any
    tokens: Mapping[str, int]
    brackets: frozenset[str]
    pattern: re.Pattern[str] | None
    ends: re.Pattern[str] | None
    closing: str | None

    @classmethod
    def of(cls, tokenizer: Any, template: Any = None) -> "Markup":
        """Markup of a tokenizer and of a chat template: the tokenizer's own, unless another one is used."""
        template = template if isinstance(template, str) else None
        tokens, brackets = _special_tokens(tokenizer), _brackets_around_a_turn(tokenizer, template)
        own = {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token in tokens}
        text = _behind_an_answer(tokenizer, template)
        behind = _brackets_in(tokenizer, text)
        pattern, closers = _any_of({*tokens, *brackets}), _any_of({*tokens, *behind})
        closing = closers.search(text) if closers is not None else None
        return cls(
            tokenizer, tokens, brackets | behind, pattern, _any_of(own | behind), closing.group() if closing else None
        )

    def first_in(self, texts: Iterable[str], *, of_assistant: bool = False) -> str | None:
        """The first markup that texts would be read to hold, if any.

        Args:
            texts: of turns.
            of_assistant (`bool`): whether they are an assistant's, in which only ends of its turn are looked for.
        """
        pattern = self.ends if of_assistant else self.pattern
        for text in texts:
            found = pattern.search(text) if pattern is not None else None
            if found and found.group() in self.brackets:
                return found.group()
            if found:
                held = set(self.tokenizer(text, add_special_tokens=False)["input_ids"]) & set(self.tokens.values())
                if held:
                    return next(token for token, number in self.tokens.items() if number in held)
        return None


def _any_of(texts: Collection[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    # A word that the vocabulary lacks is read as the unknown token: no markup. Of GPT-2 that token ends texts, too.
    unknown = tokenizer.unk_token_id
    ends = {tokenizer.bos_token, tokenizer.eos_token} & {tokenizer.unk_token}
    return {token: number for token, number in (added | named).items() if number != unknown or token in ends}


def _brackets_around_a_turn(tokenizer: Any, template: str | None) -> frozenset[str]:
    text = rendered_trial(tokenizer, template, [{"role": "user", "content": _USERS_TEXT}])
    return _brackets_in(tokenizer, text.replace(_USERS_TEXT, ""))


def _behind_an_answer(tokenizer: Any, template: str | None) -> str:
    question, answer, next_question = "trial question", "trial answer", "trial question again"
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": next_question},
    ]
    behind = rendered_trial(tokenizer, template, turns).partition(answer)[2]
    return behind.partition(next_question)[0]


def _brackets_in(tokenizer: Any, text: str) -> frozenset[str]:
    return frozenset(re.findall("<[|\uff5c]?/?\\w[^<>\\s]*>|\\[/?[A-Z_]{2,}\\]", text)) - {tokenizer.unk_token}


def check_control_tokens(row: Mapping[str, Any], markup: Markup) -> None:
    """Raise `DataError` where the text of a row would act as markup: close a turn, or open one.

    A text prompt may hold such tokens (it is given as it stands), but then p has no place in it.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        inside = markup.first_in([prompt])
        if inside and not lacks_privileged(row):
            raise DataError(
                f"column 'prompt': the text holds {inside!r}, as if a chat template had rendered it, so that "
                "privileged_context would stand outside of its turn. Give the conversation instead of its rendering"
            )
    for number, turn in enumerate(prompt if isinstance(prompt, list) else []):
        found = markup.first_in([turn["role"]])
        if found:
            raise DataError(
                f"column 'prompt', turn {number}: role (={cut(turn['role'])!r}) holds {found!r}, which the tokenizer "
                "reads as markup. It must be 'user', 'assistant', 'system' or 'tool'"
            )
        found = markup.first_in(_written_of(turn), of_assistant=turn["role"] == "assistant")
        if found:
            raise DataError(
                f"column 'prompt': the {turn['role']}'s text holds {found!r}, which the tokenizer reads as markup. "
                "Remove it; a prompt that a chat template has rendered is to be given as the conversation that it "
                "was, or with prompt_format='text'"
            )
    written = _markup_in_options(row_options(row), markup)
    if written:
        name, token = written
        column = name if name in row else TEMPLATE_COLUMN
        place = "it" if column == name else f"{name!r}"
        raise DataError(
            f"column {column!r}: a text (or a name) in {place} holds {token!r}, which the tokenizer reads as markup. "
            "Remove it"
        )
    for column in TEXT_COLUMNS:
        text = row.get(column)
        found = markup.first_in([text]) if isinstance(text, str) else None
        if found:
            raise DataError(
                f"column {column!r}: the text holds {found!r}, which the tokenizer reads as markup and which could "
                "end the user's turn. Remove it from the text"
            )


def check_joined_texts(prompt: Prompt, markup: Markup) -> None:
    """Raise `DataError` where texts of a row that are none by themselves become markup beside one another, or beside
    the words of `privileged_template`.
    """
    for turn in prompt if isinstance(prompt, list) else []:
        found = markup.first_in(texts_of(turn)) if turn["role"] == "user" else None
        if found:
            raise DataError(
                f"column 'prompt' or 'privileged_context': joined by privileged_template, they hold {found!r}, which "
                "the tokenizer reads as markup. Remove its parts"
            )


def check_control_tokens_of_settings(
    template: PrivilegedTemplate,
    options: Mapping[str, Any],
    markup: Markup,
    *,
    chat: bool,
    setting: str = "chat_template_kwargs",
) -> None:
    """Raise `ConfigError` where settings would act as markup inside of a turn.

    Args:
        template (`PrivilegedTemplate`): where privileged context goes.
        options (`dict`): arguments of the chat template. Special tokens may be set there under their own names.
        markup (`Markup`): of tokenizer and chat template.
        chat (`bool`): whether prompts are turns; around a text prompt a setting may write the turn itself.
        setting (`str`): where the options were set.
    """
    token = markup.first_in([template.template]) if chat and template.template else None
    if token:
        raise ConfigError(
            f"privileged_template (={cut(str(template.template))!r}) holds {token!r}, which the tokenizer reads as "
            "markup: what follows would stand outside of the user's turn. Remove it; the chat template writes the turn"
        )
    named = {*markup.tokenizer.special_tokens_map}
    found = _markup_in_options({name: value for name, value in options.items() if name not in named}, markup)
    if found:
        raise ConfigError(
            f"{setting}: a text (or a name) in {found[0]!r} holds {found[1]!r}, which the tokenizer reads "
            "as markup. Remove it"
        )


def _markup_in_options(options: Mapping[str, Any], markup: Markup) -> tuple[str, str] | None:
    """The first argument of a chat template that holds markup, and that markup; a template itself may hold any."""
    for name, value in options.items():
        token = None if name == "chat_template" else markup.first_in(strings_in({name: value}))
        if token:
            return name, token
    return None


def _written_of(turn: Mapping[str, Any]) -> Iterator[str]:
    """Texts and names of a turn that a chat template may write: all but its pictures."""
    yield from texts_of(turn)
    yield from strings_in({name: value for name, value in turn.items() if name not in ("role", "content")})
    yield from strings_in([block for block in blocks_of(turn) if not is_image(block)])


def strings_in(value: Any) -> Iterator[str]:
    """The texts in a value, and the names of its fields, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from strings_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings_in(inner)
