"""What is watched of a training's rollouts: leaks of p, loops, lengths; logged each step, and warned of once.

Shapes: N answers of all ranks.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Gt
from transformers import TrainerCallback

from dopd.inspection.schema import prompt_text
from dopd.ranks import Ranks
from dopd.report.monitors import COPIES, FEW, LENGTH, LOOPS, MONITORS, SPEAKS, limits_of
from dopd.sampling import Ending
from dopd.settings import Probability, Setting, as_mapping, check
from dopd.step import Rollouts
from dopd.wording import copies_hint, distinct, loops, speaks_of_hint

if TYPE_CHECKING:
    from dopd.trainer.config import DOPDConfig

logger = logging.getLogger(__name__)

_DISTINCT, _CHANGE = "repetition/distinct_3", "completions/length_change"


def read_limits(args: "DOPDConfig") -> list[str]:
    """Have `monitor_limits` as it is meant.

    Returns:
        What is wrong with it.
    """
    if args.monitor_limits is None:
        return []
    hints: dict[bool, Any] = {True: Annotated[float, Gt(1)] | None, False: Probability | None}
    settings = {name: Setting(name, hints[one.is_factor], one.limit) for name, one in MONITORS.items()}
    read, problems = check(as_mapping(args.monitor_limits), settings, "monitor_limits")
    if not problems:
        args.monitor_limits = read
    return problems


def answer_metrics(
    rollouts: Rollouts, texts: Sequence[str], ending: Ending, ranks: Ranks, *, needs_privileged: bool
) -> dict[str, float]:
    """Shares of the answers of all ranks that loop, repeat their p or speak of one, and their mean distinct-3.

    Args:
        texts (`list[str]`): of the answers.
        needs_privileged (`bool`): whether the method reads p: otherwise no answer can have learned of it.
    """
    bare = [ids[:-1] if ending.ended(ids) else ids for ids in rollouts.answers]
    columns = {LOOPS: [float(loops(ids)) for ids in bare], _DISTINCT: [distinct(ids) for ids in bare]}
    if needs_privileged:
        asked = [(text, _hint(row), prompt_text(row["prompt"])) for text, row in zip(texts, rollouts.rows, strict=True)]
        columns[COPIES] = [float(copies_hint(*one)) if one[1] else math.nan for one in asked]
        columns[SPEAKS] = [float(speaks_of_hint(text, prompt)) for text, _, prompt in asked]
    rows = torch.tensor([*zip(*columns.values(), strict=True)], dtype=torch.float64, device=rollouts.mask.device)
    of_all = ranks.gathered(rows).unbind(1)
    means = {name: values_N[~values_N.isnan()].mean().item() for name, values_N in zip(columns, of_all, strict=True)}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}  # none of the answers has it


def _hint(row: Mapping[str, Any]) -> str:
    text = row.get("privileged_context")
    return text if isinstance(text, str) else ""


def length_change(metrics: Mapping[str, float], history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The mean length of a step's answers over that of the first logged steps, once these are over.

    Args:
        metrics (`dict`): of the step.
        history (`list[dict]`): what was logged before, which a run that goes on remembers.
    """
    first = [record[LENGTH] for record in islice((one for one in history if LENGTH in one), FEW)]
    return {_CHANGE: metrics[LENGTH] / fmean(first)} if len(first) == FEW and fmean(first) > 0 else {}


class MonitorWarnings(TrainerCallback):
    """Warns, once for each monitor, where the last logged steps are beyond its limit, from the first ones."""

    def __init__(self, args: "DOPDConfig") -> None:
        self._limits = limits_of(vars(args))
        self._values: dict[str, list[float]] = {}
        self._warned: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._warned = set()
        self._values = {name: [one[name] for one in state.log_history if name in one] for name in MONITORS}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for name, values in self._values.items():
            if logs is None or name not in logs or name in self._warned:
                continue
            values.append(logs[name])
            found = MONITORS[name].beyond(values, self._limits[name])
            if found is not None:
                self._warned.add(name)
                if state.is_world_process_zero:
                    self._warn(name, *found, state.global_step)

    def _warn(self, name: str, start: float, end: float, step: int) -> None:
        monitor = MONITORS[name]
        logger.warning(
            f"step {step}: {monitor.title}: {name} went from {start:.3g} to {end:.3g} (means of the first and of the "
            f"last {FEW} logs), beyond monitor_limits: {name} (={self._limits[name]:g}). {monitor.advice}"
        )
