"""Probes: the same few prompts answered again at every traced step, so that one can be followed through a run."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from datasets import IterableDataset

from dopd.evaluation.results import Sampling
from dopd.inspection.inspector import Inspector
from dopd.ranks import Alone
from dopd.sources import LIVE
from dopd.step import Step
from dopd.step.rewards import unlogged
from dopd.step.verifier import unjudged
from dopd.trainer.host import HostTrainer
from dopd.trainer.models import TrainedModels
from dopd.trainer.served import make_scorer
from dopd.trainer.setup import answering
from dopd.trainer.trace import Probe, TraceWriter

logger = logging.getLogger(__name__)


class _OfThisProcess(TrainedModels):
    """The models of a run for one process alone: without the wrappers, whose passes all processes make together."""

    def __init__(self, models: TrainedModels) -> None:
        self.__dict__ = models.__dict__  # one cache of image features

    @contextmanager
    def source_model(self, source: str) -> Iterator[Any]:
        whole: AbstractContextManager[Any] = self.whole_student() if source == LIVE else super().source_model(source)
        with whole as model:
            yield self.unwrapped(model)

    def through_wrapper(self, model: Any, method: Any, *arguments: Any) -> Any:
        return method(model, *arguments)


def make_trace(host: HostTrainer, step: Step) -> TraceWriter | None:
    """The writer of traced completions, if the configuration asks for one."""
    args = host.args
    if args.trace_steps is None:
        return None
    return TraceWriter(
        host.run_folder,
        step,
        every=args.trace_steps,
        examples=args.trace_examples,
        max_bytes=args.trace_max_bytes,
        writes=host.accelerator.is_main_process,
        probe=_make_probe(host, step) if args.trace_probes else None,
    )


def _make_probe(host: HostTrainer, step: Step) -> Probe | None:
    """What answers the first prompts of the training data; `None` where one process alone cannot."""
    args, dataset = host.args, host.train_dataset
    if host.is_split or isinstance(dataset, IterableDataset):
        logger.warning(f"trace_probes (={args.trace_probes}) needs whole weights and a sized dataset: no probes")
        return None
    models = _OfThisProcess(host.models)
    batch_size = args.student_eval_batch_size
    scorer = make_scorer(host, models, batch_size, step.merged_ids, Alone())
    drawn = Sampling(temperature=host.temperature)
    evaluator = replace(answering(host, [], host.judge.verifier or unjudged), sampling=drawn)
    rows = [dataset[n] for n in range(min(args.trace_probes, len(dataset)))]
    judge = replace(step.judge, of_the_run=lambda: unlogged(host.state))
    inspector = Inspector(replace(step, scorer=scorer, judge=judge, ranks=Alone()), evaluator, models)
    return Probe(inspector, rows)
