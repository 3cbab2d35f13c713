"""The models of a run: student, teacher, and the student's other weights, distributed or not."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dopd.lengths import is_first_regime
from dopd.prefix import architecture, hidden_states_sharing_prompts
from dopd.scoring import Balance, View, generation_inputs, view_hidden_states
from dopd.sources import SOURCES
from dopd.trainer.anchor import AbstractAnchor, CurrentAnchor
from dopd.trainer.base_teacher import adapters_off
from dopd.trainer.host import HostTrainer
from dopd.trainer.passes import check_causal
from dopd.trainer.sharded_teacher import reshard
from dopd.vision.media import FeatureCache

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainedModels:
    """Passes of every model of a run; implements `dopd.step.Models` and `dopd.step.engine.WholeStudent`.

    Args:
        host (`HostTrainer`): owns student and teacher.
        anchor, initial (`AbstractAnchor`): the weights of the privileged student, and the student's first ones.
        sharing (`frozenset[type]`): model classes whose prompts are run once for all their rollouts.
        encoding_once (`frozenset[type]`): model classes that take the features of each image, made once.

    Attributes:
        vocab_size (`int`): ids from 0 on that student and teacher both have.
    """

    def __init__(
        self,
        host: HostTrainer,
        anchor: AbstractAnchor,
        initial: AbstractAnchor,
        *,
        sharing: frozenset[type],
        encoding_once: frozenset[type],
    ) -> None:
        self.sharing, self.encoding_once = sharing, encoding_once
        self._host, self._anchor, self._initial = host, anchor, initial
        self.vocab_size = host.scored_vocab_size
        self._features = FeatureCache()
        self._tried = set[tuple[str, int]]()
        self._reads_as_teacher = False  # the student, with its adapters off

    def forget_features(self) -> None:
        """Drop image features: weights change between steps."""
        self._features.clear()

    @contextmanager
    def source_model(self, source: str) -> Iterator[Any]:
        origin, host = SOURCES[source].model, self._host
        anchor = self._initial if origin == "initial" else self._anchor
        if origin == "teacher" and not host.args.teacher_is_base:
            yield host.teacher_model if host.parked.current is None else host.parked.current
            if host.splits_teacher:
                reshard(host.teacher_model)
        elif origin == "student" or (origin != "teacher" and isinstance(anchor, CurrentAnchor)):
            yield host.model_wrapped
        else:
            # Image features made while other weights stand in the student's place are not the student's.
            students, self._features = self._features, FeatureCache()
            self._reads_as_teacher = origin == "teacher"
            wrapped = host.model_wrapped
            other = adapters_off(wrapped, host.unwrapped_student) if self._reads_as_teacher else None
            try:
                with other or anchor.scoring_model(wrapped) as model:
                    yield model
            finally:
                self._features, self._reads_as_teacher = students, False

    def teacher_in_place(self, teacher: str) -> AbstractContextManager[Any]:
        return self._host.parked.in_place(teacher)

    def unwrapped(self, model: nn.Module) -> Any:
        return self._host.accelerator.unwrap_model(model)

    def through_wrapper(self, model: nn.Module, method: Any, *arguments: Any) -> Any:
        return self._host.through_wrapper(model, method, *arguments)

    def whole_student(self) -> AbstractContextManager[Any]:
        return self._host.whole_student()

    def before_scoring(self, source: str, model: Any, view: View) -> None:
        """Try once for each source whether it is causal, where that could not be tried before: here the weights of a
        split model are whole, on every process at the same time.
        """
        tried = (source, id(model))
        if self._host.is_split and tried not in self._tried:
            self._tried.add(tried)
            check_causal(source, model, view.rows(0, 1), hidden_states=self.hidden_states, gradients=False)

    def generation_inputs(self, model: Any, view: View) -> Mapping[str, Any]:
        once = architecture(model) in self.encoding_once
        with self._host.accelerator.autocast():
            return generation_inputs(model, view, cache=self._features, as_features=once)

    def hidden_states(
        self, model: Any, view: View, completion_ids: Tensor, mask: Tensor, balance: Balance | None = None
    ) -> Tensor:
        """Last hidden states (B, T, H) of a view; each different prompt is run once where the model allows it, and each
        different image encoded once.

        In mixed precision they come in the precision that the head computes in; norms would leave them in float32.

        Args: as `dopd.scoring.view_hidden_states`. A load-balancing loss is of whole sequences, so for it nothing is
        shared.
        """
        host = self._host
        if view.for_teacher is not None and (host.is_teacher(model) or self._reads_as_teacher):
            view = view.for_teacher
        # Checkpointed layers keep no keys and values.
        checkpointed = model.training and host.args.gradient_checkpointing
        shares = architecture(model) in self.sharing and not checkpointed and balance is None
        longest = max(view.lengths) + completion_ids.shape[1]
        with host.accelerator.autocast():
            if shares and is_first_regime(model.config, longest):
                hidden = hidden_states_sharing_prompts(model, view, completion_ids, mask, cache=self._features)
            else:
                once = architecture(model) in self.encoding_once
                options: dict[str, Any] = {"cache": self._features, "as_features": once, "balance": balance}
                hidden = view_hidden_states(model, view, completion_ids, mask, **options)
        half = _HALF.get(host.accelerator.mixed_precision)
        return hidden if half is None else hidden.to(half)
