"""A model of this machine that vLLM answers with."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopd.checkpoints import origin_of
from dopd.data.encode import image_sources
from dopd.data.views import PrivilegedTemplate, Prompt
from dopd.errors import ConfigError, DataError
from dopd.evaluation.elsewhere import Answer
from dopd.evaluation.results import Sampling
from dopd.files import beginning
from dopd.runs.build import load_processing_class, resolve_model
from dopd.runs.circumstances import Circumstances
from dopd.step import PromptEncoder

if TYPE_CHECKING:
    from vllm import SamplingParams


def check_vllm(name: str) -> None:
    """Raise `ConfigError` where vLLM is not here, or cannot read a model as it lies there."""
    if find_spec("vllm") is None:
        raise ConfigError("engine (='vllm') needs vLLM, which is not installed: pip install 'dopd[vllm]'")
    if origin_of(resolve_model(name)) is not None:
        raise ConfigError(
            f"engine (='vllm'): {name!r} is an adapter: merge it into its base first (docs/how-to/merge-lora.md), or "
            "leave --engine out"
        )


def weights_of(name: str) -> dict[str, Any] | None:
    """What the weights in a folder are known again by: of each file its size and the checksum of its beginning; `None`
    for a hub id.
    """
    folder = Path(resolve_model(name))
    return {path.name: beginning(path) for path in sorted(folder.glob("*.safetensors"))} or None


class VLLMAnswers:
    """Answers as `dopd.evaluation.elsewhere.Answerer`; texts alone.

    Args:
        name (`str`): a hub id, a folder or `tiny:TASK/ROLE`.
        asked (`Circumstances`): how it is asked.
        dtype (`str`): of its weights.
        seed (`int`): of sampled answers.
        options (`dict`): further arguments of `vllm.LLM`, such as `gpu_memory_utilization`.
    """

    def __init__(
        self, name: str, asked: Circumstances, *, dtype: str, seed: int, options: Mapping[str, Any] | None = None
    ) -> None:
        from vllm import LLM

        self.encoder = PromptEncoder(
            load_processing_class(name),
            PrivilegedTemplate(asked.privileged_template),
            asked.chat_template_kwargs,
            asked.prompt_format,
        )
        self._asked, self._seed = asked, seed
        try:
            self._llm = LLM(**{"model": resolve_model(name), "dtype": dtype, "seed": seed, **(options or {})})
        except TypeError as error:
            raise ConfigError(f"engine_options (={dict(options or {})!r}): vLLM does not take them: {error}") from error

    @property
    def template(self) -> PrivilegedTemplate:
        return self.encoder.template

    def asked(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows as they are asked."""
        return self.encoder.asked(rows)

    def answered(self, prompts: Sequence[Prompt], label: str, sampling: Sampling | None) -> list[list[Answer]]:
        """Answers to each prompt: as many as are drawn, or the likeliest one without `sampling`.

        Raises:
            DataError: a prompt with pictures.
        """
        if any(image_sources(prompt) for prompt in prompts):
            raise DataError(
                "engine (='vllm') answers texts alone here: leave --engine out, or serve the model (vllm serve MODEL) "
                "and judge it as NAME=URL"
            )
        requests = [{"prompt_token_ids": ids} for ids in self.encoder.encode(list(prompts))]
        outputs = self._llm.generate(requests, self._params(sampling))
        return [
            [
                Answer(self.encoder.text(one.token_ids), len(one.token_ids), one.finish_reason == "stop")
                for one in output.outputs
            ]
            for output in outputs
        ]

    def _params(self, sampling: Sampling | None) -> "SamplingParams":
        from vllm import SamplingParams

        own: dict[str, Any] = {"temperature": 0.0}
        if sampling is not None:
            own = {"n": sampling.samples, "temperature": sampling.temperature, "top_p": sampling.top_p}
            own |= {"seed": self._seed} | ({"top_k": sampling.top_k} if sampling.top_k else {})
        if self._asked.stop_strings:
            own |= {"stop": list(self._asked.stop_strings), "include_stop_str_in_output": True}
        # vLLM adds the ends that the checkpoint's generation config declares.
        ends = [self.encoder.tokenizer.eos_token_id]
        own["stop_token_ids"] = [token for token in ends if token is not None]
        return SamplingParams(max_tokens=self._asked.max_new_tokens, **own)
