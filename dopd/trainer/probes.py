"""Probes: the same few prompts answered again at every traced step, so that one can be followed through a run."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from datasets import IterableDataset

from dopd.evaluation.verifier import unjudged
from dopd.inspection.inspector import Inspector
from dopd.sources import LIVE
from dopd.trainer.setup import answering
from dopd.trainer.trace import TraceWriter

logger = logging.getLogger(__name__)


def make_trace(trainer: Any) -> TraceWriter | None:
    """The writer of traced completions, if the configuration asks for one."""
    args = trainer.args
    if args.trace_steps is None:
        return None
    return TraceWriter(
        args.output_dir,
        trainer.table,
        trainer._tokenizer,
        every=args.trace_steps,
        examples=args.trace_examples,
        max_bytes=args.trace_max_bytes,
        writes=trainer.accelerator.is_main_process,
        probe=_make_probe(trainer) if args.trace_probes else None,
    )


def _make_probe(trainer: Any) -> Callable[..., list[dict[str, Any]]] | None:
    """What answers the first prompts of the training data; `None` where one process alone cannot."""
    args, dataset = trainer.args, trainer.train_dataset
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or isinstance(dataset, IterableDataset):
        logger.warning(f"trace_probes (={args.trace_probes}) needs whole weights and a sized dataset: no probes")
        return None

    @contextmanager
    def models(name: str) -> Iterator[Any]:
        if name == LIVE:
            with trainer.generating_model() as model:
                yield model
        else:
            with trainer.source_model(name) as model:
                yield trainer.accelerator.unwrap_model(model)

    evaluator = answering(trainer, [], trainer.verifier or unjudged)
    inspector = Inspector(
        trainer.table, evaluator, models, hidden_states=trainer.view_hidden_states, temperature=trainer.temperature
    )
    rows = [dataset[n] for n in range(min(args.trace_probes, len(dataset)))]
    return partial(inspector.records, rows, kind="probe")
