"""A model of this machine that is asked, or scores texts, outside of any training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dopd.data.encode import tokenizer_of
from dopd.data.views import PrivilegedTemplate, Prompt, plain_prompt
from dopd.evaluation.student import StudentEvaluator
from dopd.progress import progress_bar
from dopd.runs.build import load_model, load_processing_class
from dopd.runs.circumstances import Circumstances
from dopd.sampling import Ending, declared_stop_strings, ends_of
from dopd.scoring import evaluation_mode, random_state_kept
from dopd.sources import LIVE
from dopd.step import FixedModels, LocalScorer, PromptEncoder
from dopd.step.verifier import unjudged


@dataclass(frozen=True)
class LocalModel:
    """A model that is loaded, and how it is asked.

    Attributes:
        name (`str`): a hub id, a folder or `tiny:TASK/ROLE`.
        model: a transformers model in evaluation mode.
        asking (`StudentEvaluator`): reads prompts and answers them.
    """

    name: str
    model: Any
    asking: StudentEvaluator

    @classmethod
    def load(
        cls, name: str, asked: Circumstances, *, dtype: str = "float32", batch_size: int = 16, seed: int = 0
    ) -> "LocalModel":
        """Load a model on the GPU, if there is one.

        Raises:
            ConfigError, ModelError: as `dopd.runs.build.load_model`.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        processing_class = load_processing_class(name)
        model = load_model(name, dtype=dtype).to(device).eval()
        tokenizer = tokenizer_of(processing_class)
        encoder = PromptEncoder(
            processing_class,
            PrivilegedTemplate(asked.privileged_template),
            asked.chat_template_kwargs,
            asked.prompt_format,
        )
        ending = Ending(ends_of(model, tokenizer), asked.stop_strings or declared_stop_strings(model), tokenizer)
        asking = StudentEvaluator([], unjudged, encoder, ending, asked.max_new_tokens, batch_size, seed)
        return cls(name, model, asking)

    @property
    def prompts(self) -> PromptEncoder:
        return self.asking.prompts

    def asks(self, text: str, pictures: Sequence[Any] = ()) -> Prompt:
        """A text as this model is asked it, behind pictures."""
        return plain_prompt(self.prompts.asked_row({"prompt": text, "images": list(pictures)}))

    def answers(self, prompts: Sequence[Prompt], label: str, *, sampled: bool = False) -> list[tuple[str, bool]]:
        """An answer to each prompt: its text, and whether it ended by itself."""
        found: list[tuple[str, bool]] = []
        size = self.asking.batch_size
        with evaluation_mode(self.model), random_state_kept(self.model), torch.no_grad():
            torch.manual_seed(self.asking.seed)
            with progress_bar(label, len(prompts), "prompt") as bar:
                for start in range(0, len(prompts), size):
                    part = list(prompts[start : start + size])
                    for ids in self.asking.answers(self.model, part, sampled=sampled):
                        found.append((self.prompts.text(ids), self.asking.ending.ended(ids)))
                    bar.update(len(part))
        return found

    def logprobs(self, prompts: Sequence[Prompt], texts: Sequence[Sequence[int]], label: str) -> list[list[float]]:
        """Log-probs (nats) of the tokens of a text behind each prompt."""
        found: list[list[float]] = []
        scorer = LocalScorer(FixedModels(self.model), self.asking.batch_size)
        size = self.asking.batch_size
        with progress_bar(label, len(prompts), "text") as bar:
            for start in range(0, len(prompts), size):
                part = list(prompts[start : start + size])
                ids, mask, _ = self.prompts.padded(texts[start : start + size], self.model.device)
                view = self.prompts.view(part, self.model.device)
                scores = scorer.score(LIVE, view, ids, mask).tokens.logprobs
                found += [
                    row[: len(one)].tolist() for row, one in zip(scores, texts[start : start + size], strict=True)
                ]
                bar.update(len(part))
        return found
