"""A conversation through its chat template, and what must be true of the result: nothing of the user's words is lost,
nothing in the data acts as markup, and one beginning stands at the beginning.
"""

import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dopd.data.left_out import CALLS, TOOLS, Trial, lost_tool, lost_words
from dopd.data.privileged import Conversation, Prompt
from dopd.errors import DataError, cut
from dopd.interrupts import TooLongError, alarm_after

CONTINUE = "continue_final_message"
_OF_PROCESSOR = "processor_kwargs"
_ASKING_ROLES = ("user", "tool")
_TRIAL = ("first trial block", "second trial block")
_LONGEST, _MOST = 20, 20_000_000  # seconds that one rendering may take, characters that it may have
# Turns before and behind one on trial, by its role.
_A_USER = ({"role": "user", "content": "a"},)
_AROUND: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
    "system": ((), _A_USER),
    "developer": ((), _A_USER),
    "assistant": (_A_USER, _A_USER),
    "tool": ((*_A_USER, {"role": "assistant", "content": "a"}), ()),
}


class EndlessError(DataError):
    """A chat template that loops without an end, or writes without one."""


def template_of(processing_class: Any, options: Mapping[str, Any]) -> Any:
    """The chat template that conversations are rendered with; `None` where there is none."""
    owners = (processing_class, getattr(processing_class, "tokenizer", None))
    return options.get("chat_template") or next(filter(None, (getattr(o, "chat_template", None) for o in owners)), None)


def asks_text(processing_class: Any, options: Mapping[str, Any], prompt_format: str) -> bool:
    """Whether a text prompt is asked as a user's turn: where `prompt_format` is `"auto"` and a template exists."""
    return prompt_format == "auto" and template_of(processing_class, options) is not None


def template_arguments(processing_class: Any, prompt: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `apply_chat_template` for one conversation: the run's, the row's own, and how it goes on."""
    own = prompt.options if isinstance(prompt, Conversation) else {}
    # transformers writes into what it is given here.
    merged = {name: dict(value) if name == _OF_PROCESSOR else value for name, value in {**options, **own}.items()}
    template = template_of(processing_class, merged)
    if template is not None and getattr(processing_class, "chat_template", None) is None:
        merged["chat_template"] = template  # a processor does not look at its tokenizer's
    goes_on = bool(merged.pop(CONTINUE, False)) and prompt[-1]["role"] == "assistant"
    return {**merged, "add_generation_prompt": not goes_on, **({CONTINUE: True} if goes_on else {})}


def check_last_turn(prompt: Prompt, options: Mapping[str, Any]) -> None:
    """Raise `DataError` unless an answer can follow a conversation."""
    if isinstance(prompt, str):
        return
    role = prompt[-1]["role"]
    own = prompt.options if isinstance(prompt, Conversation) else {}
    if role in _ASKING_ROLES or (role == "assistant" and {**options, **own}.get(CONTINUE)):
        return
    raise DataError(
        f"column 'prompt': the last turn is the {role}'s; an answer follows the user's (or a tool's). "
        + (
            "Leave the answer out of the prompt, or set chat_template_kwargs={'continue_final_message': True} to have "
            "it continued"
            if role == "assistant"
            else "Put the instruction before the user's turn"
        )
    )


def as_template_reads(tokenizer: Any, prompt: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[Any]:
    """The turns as a text model's chat template can read them: one text in the place of blocks, or the other way round,
    where it knows the other alone.

    Raises:
        DataError: a block that is no text.
    """
    for turn in prompt:
        for block in turn["content"] if isinstance(turn.get("content"), list) else []:
            if block.get("type", "text") != "text" or not isinstance(block.get("text"), str):
                raise DataError(
                    f"column 'prompt': a block of type {block.get('type')!r} in the {turn['role']}'s turn; the model "
                    "reads text only, as {'type': 'text', 'text': ...}"
                )
    template = template_of(tokenizer, options)
    text = template if isinstance(template, str) else None
    return [
        {**turn, "content": _readable(turn["content"], _read_kinds(tokenizer, text, turn["role"]))}
        if isinstance(turn.get("content"), str | list)
        else dict(turn)
        for turn in prompt
    ]


def _readable(content: str | list[Any], kinds: frozenset[type]) -> Any:
    if type(content) in kinds or not kinds:
        return content
    return [{"type": "text", "text": content}] if isinstance(content, str) else "\n".join(b["text"] for b in content)


def rendered_turns(
    processing_class: Any, prompt: list[dict[str, Any]], options: Mapping[str, Any], blocks: list[Any] | None = None
) -> tuple[list[Any], dict[str, Any], str]:
    """The turns of a conversation as its template reads them, the template's arguments, and what it makes of them.

    Args:
        blocks (`list`, *optional*): the turns in the form in which they are read; the template decides if left out.
    """
    check_last_turn(prompt, options)
    arguments = template_arguments(processing_class, prompt, options)
    turns = as_template_reads(processing_class, prompt, options) if blocks is None else blocks
    turns = with_readable_calls(processing_class, turns, arguments)
    return turns, arguments, rendered(processing_class, turns, arguments)


def with_readable_calls(
    processing_class: Any, turns: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> list[Any]:
    """The turns with tool calls as the chat template can write them: arguments as a mapping, where it takes one, or as
    JSON; the content beside a call missing, or empty.

    Args: as `rendered`.

    Raises:
        DataError: it can write them in no form.
    """
    if not any(turn.get(CALLS) for turn in turns):
        return list(turns)
    template = template_of(processing_class, arguments)
    kinds = _read_kinds(processing_class, template if isinstance(template, str) else None, "assistant")
    refusals: list[DataError] = []
    for as_json, empty in itertools.product((False, True), (None, _readable("", kinds))):
        tried = [_with_calls(turn, empty, as_json=as_json) if turn.get(CALLS) else turn for turn in turns]
        try:
            rendered(processing_class, tried, arguments)
        except DataError as refusal:
            refusals.append(refusal)
        else:
            return tried
    # What a template leaves out says more than what it fails on; where it is given every field, that is no lack of one.
    raise next((refusal for refusal in refusals if refusal.__cause__ is None), refusals[1])


def _with_calls(turn: Mapping[str, Any], empty: Any, *, as_json: bool) -> dict[str, Any]:
    calls = []
    for call in turn[CALLS]:
        named = call.get("function", call)
        named = {**named, "arguments": _arguments(named.get("arguments"), as_json=as_json)}
        calls.append({**call, "function": named} if "function" in call else named)
    content = turn.get("content")
    return {**turn, CALLS: calls, "content": empty if content is None else content}


def _arguments(arguments: Any, *, as_json: bool) -> Any:
    """Arguments of a tool call, which datasets hold as a mapping or, in OpenAI's words, as its JSON."""
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except json.JSONDecodeError:
            return arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    return json.dumps(arguments, ensure_ascii=False) if as_json and isinstance(arguments, Mapping) else arguments


@lru_cache(maxsize=64)
def _read_kinds(tokenizer: Any, template: str | None, role: str) -> frozenset[type]:
    """Which contents a chat template can read in a role's turn: `str`, `list` (blocks), or both. A role whose turns it
    does not write in a conversation on trial is taken for the user.
    """
    own = {} if template is None else {"chat_template": template}
    readable = set[type]()
    for content in (" ".join(_TRIAL), [{"type": "text", "text": text} for text in _TRIAL]):
        try:
            before, behind = _AROUND.get(role, ((), ()))
            turns = [*before, {"role": role, "content": content}, *behind]
            text = _written(tokenizer, turns, {"add_generation_prompt": True, **own})
        except EndlessError:
            raise
        except Exception:  # templates fail in whatever way their expressions do
            continue
        if all(words in text for words in _TRIAL) and not re.search(r"['\"]type['\"]", text):
            readable.add(type(content))
    if not readable and role != "user":
        return _read_kinds(tokenizer, template, "user")
    return frozenset(readable)


def rendered(processing_class: Any, turns: Sequence[Any], arguments: Mapping[str, Any]) -> str:
    """The text that a chat template makes of a conversation, with every word of user and system in it.

    Args:
        processing_class: a tokenizer or a processor.
        turns: as its template reads them.
        arguments: of `template_arguments`.

    Raises:
        DataError: the template refuses the conversation, or leaves out text of a turn.
    """
    if template_of(processing_class, arguments) is None:
        raise DataError(
            "column 'prompt': it is a conversation, and the tokenizer has no chat template to write it with. Give "
            "plain text, or set tokenizer.chat_template (chat_template_kwargs={'chat_template': ...} in a config)"
        )
    try:
        text = _written(processing_class, turns, arguments)
    except EndlessError:
        raise
    except Exception as error:  # a template raises what it likes: TemplateError, TypeError, UndefinedError, ...
        raise DataError(f"column 'prompt': the chat template refuses the conversation: {_first_line(error)}") from error
    check_unicode(text)
    _check_nothing_left_out(processing_class, text, turns, arguments)
    return text


def _written(processing_class: Any, turns: Sequence[Any], arguments: Mapping[str, Any]) -> str:
    """What a template writes, or `EndlessError`: a template is a program, and comes with a checkpoint."""
    try:
        with alarm_after(_LONGEST, "the chat template"):
            text = str(processing_class.apply_chat_template(list(turns), tokenize=False, **arguments))
    except TooLongError:
        raise EndlessError(
            f"column 'prompt': the chat template was not done after {_LONGEST} seconds: it loops without an end. Take "
            "another (chat_template_kwargs={'chat_template': ...} in a config)"
        ) from None
    if len(text) > _MOST:
        raise EndlessError(
            f"column 'prompt': the chat template writes {len(text):,} characters, and a prompt has at most {_MOST:,}. "
            "Take another (chat_template_kwargs={'chat_template': ...} in a config)"
        )
    return text


def _check_nothing_left_out(
    processing_class: Any, text: str, turns: Sequence[Any], arguments: Mapping[str, Any]
) -> None:
    trial, template = Trial.of(turns, arguments), template_of(processing_class, arguments)
    place = _lost_in(processing_class, template if isinstance(template, str) else repr(template), trial)
    part = trial.parts[place] if place is not None else None
    tool = lost_tool(text, arguments) if part is None else None
    lost = tool or (lost_words(text, turns) if part is None else part.what)
    column = part.column if part else TOOLS if tool else "prompt"
    if lost is not None:
        raise DataError(
            f"column {column!r}: the chat template leaves out {lost}. Leave it out of the "
            "row, or set a chat template that writes contents of this kind (chat_template_kwargs={'chat_template': "
            "...})"
        )


@lru_cache(maxsize=1024)
def _lost_in(processing_class: Any, template: str, trial: Trial) -> int | None:
    """The place among its parts of the first one that a chat template leaves out of a trial."""
    try:
        text = _written(processing_class, trial.turns, trial.arguments)
    except EndlessError:
        raise
    except Exception:  # it reads the texts, and takes no others in their place: nothing can be said
        return None
    return trial.lost_in(text)


def check_unicode(text: str) -> None:
    """Raise `DataError` for text that no tokenizer can read: half of a pair of surrogates, as cut or wrongly decoded
    text has it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = ascii(text[max(error.start - 20, 0) : error.end + 20])
        raise DataError(
            f"column 'prompt' or 'privileged_context': {around} holds {text[error.start]!a}, half of a character "
            "(a lone surrogate). Was the text cut, or decoded with errors='surrogateescape'? Mend or drop the row"
        ) from error


def check_beginning(tokenizer: Any, ids: Sequence[int]) -> None:
    """Raise `DataError` where a prompt begins with two beginning-of-sequence tokens."""
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise DataError(
            f"column 'prompt': it begins with two {tokenizer.bos_token!r} tokens: the chat template or the text writes "
            "one and so does the tokenizer. Remove the one in the text"
        )


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
    text = _rendered_trial(tokenizer, template, [{"role": "user", "content": _TRIAL[0]}])
    return _brackets_in(tokenizer, text.replace(_TRIAL[0], ""))


def _behind_an_answer(tokenizer: Any, template: str | None) -> str:
    question, answer, next_question = "trial question", "trial answer", "trial question again"
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": next_question},
    ]
    behind = _rendered_trial(tokenizer, template, turns).partition(answer)[2]
    return behind.partition(next_question)[0]


def _rendered_trial(tokenizer: Any, template: str | None, turns: list[dict[str, Any]]) -> str:
    options = {} if template is None else {"chat_template": template}
    if template_of(tokenizer, options) is None:
        return ""
    try:
        return _written(tokenizer, as_template_reads(tokenizer, turns, options), options)
    except EndlessError:
        raise
    except Exception:  # what it refuses is said where a row is rendered
        return ""


def _brackets_in(tokenizer: Any, text: str) -> frozenset[str]:
    return frozenset(re.findall("<[|\uff5c]?/?\\w[^<>\\s]*>|\\[/?[A-Z_]{2,}\\]", text)) - {tokenizer.unk_token}


def _first_line(error: BaseException) -> str:
    return cut((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
