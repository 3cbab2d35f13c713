"""What is logged of a step before it is learned from, over all processes."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dopd.data.views import lacking_privileged
from dopd.ranks import Ranks
from dopd.sampling import Ending
from dopd.step.batch import Rollouts, ScoredBatch

# Upper edges of the bins of the gap histogram, nats; the last bin has none. Fixed, so that steps and runs compare.
GAP_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0)


def num_tokens(rollouts: Rollouts, ranks: Ranks) -> int:
    """Tokens of prompts and answers."""
    return int(ranks.total(rollouts.view.prompt_mask.sum() + rollouts.mask.sum()))


def rollout_metrics(rollouts: Rollouts, ending: Ending, ranks: Ranks, *, needs_privileged: bool) -> dict[str, float]:
    """Lengths of the answers in tokens, and the shares of those that ended by themselves, were right, or lacked p.

    Args:
        needs_privileged (`bool`): whether the method reads privileged context.
    """
    columns = {
        "length": [float(len(ids)) for ids in rollouts.answers],
        "ended": list(map(float, ending.ends_of(rollouts.answers))),
    }
    if needs_privileged:
        columns["missing"] = list(map(float, lacking_privileged(rollouts.rows)))
    if rollouts.scores is not None:
        columns["score"] = rollouts.scores
    if rollouts.rewards is not None and rollouts.rewards_by_function:
        columns |= {f"rewards/{name}": values for name, values in rollouts.rewards_by_function.items()}
        columns["reward"] = rollouts.rewards
    rows = torch.tensor([*zip(*columns.values(), strict=True)], dtype=torch.float64, device=rollouts.mask.device)
    of_all = dict(zip(columns, ranks.gathered(rows).unbind(1), strict=True))
    lengths_N, ended_N = of_all["length"], of_all["ended"]
    terminated_N = lengths_N[ended_N > 0] if bool(ended_N.any()) else lengths_N.new_zeros(1)
    metrics: dict[str, float] = {}
    for name, values_N in (("length", lengths_N), ("terminated_length", terminated_N)):
        metrics |= {f"completions/mean_{name}": values_N.mean().item()}
        metrics |= {f"completions/min_{name}": values_N.min().item()}
        metrics |= {f"completions/max_{name}": values_N.max().item()}
    metrics["completions/eos_ratio"] = ended_N.mean().item()
    # The host takes a sampled padding token at the length limit for an end; an answer without an end was cut.
    metrics["completions/clipped_ratio"] = 1.0 - metrics["completions/eos_ratio"]
    for column, name in (("missing", "privileged/missing_ratio"), ("score", "rollout/accuracy")):
        if column in of_all:
            metrics[name] = of_all[column].mean().item()
    return metrics | _reward_metrics({name: of_all[name] for name in of_all if name.startswith("reward")})


def _reward_metrics(rewards: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean and standard deviation of rewards (N,) where they apply, by the names that TRL gives them."""
    metrics: dict[str, float] = {}
    for name, values_N in rewards.items():
        known_N = values_N[~torch.isnan(values_N)]
        mean, deviation = (name, f"{name}_std") if name == "reward" else (f"{name}/mean", f"{name}/std")
        metrics |= {mean: known_N.mean().item()} if len(known_N) else {}
        metrics |= {deviation: known_N.std().item()} if len(known_N) > 1 else {}
    if "reward" in rewards:  # answers to which no reward function applies teach nothing
        metrics["reward/missing_ratio"] = torch.isnan(rewards["reward"]).double().mean().item()
    return metrics


def reference_metrics(batch: ScoredBatch, ranks: Ranks) -> dict[str, float]:
    """The share of rows that have no reference text; nothing for a part of a table that trains on answers."""
    if batch.table.text != "reference":
        return {}
    missing_N = ranks.gathered((batch.mask == 0).all(1).double())
    return {"reference/missing_ratio": missing_N.mean().item()}


def routing_metrics(batch: ScoredBatch, ranks: Ranks) -> dict[str, float]:
    """The averages that routed a batch, and how its gaps are spread; nothing in an unrouted table."""
    thresholds, gap_BT = batch.assignment.thresholds, batch.assignment.gap
    if thresholds is None or gap_BT is None:
        return {}
    return {
        "threshold/gap": thresholds.gap,
        "threshold/confidence": thresholds.confidence,
        "prob/privileged_teacher": thresholds.teacher_prob,
        "prob/privileged_student": thresholds.student_prob,
    } | _gap_histogram(gap_BT, batch.mask, ranks)


def _gap_histogram(gap_BT: Tensor, mask: Tensor, ranks: Ranks) -> dict[str, float]:
    """`gap_bin/EDGE`: share of the tokens whose gap is below EDGE and not below the edge before."""
    edges = torch.tensor(GAP_EDGES, dtype=gap_BT.dtype, device=gap_BT.device)
    bins_N = torch.bucketize(gap_BT[mask != 0], edges, right=True)
    counts = ranks.total(torch.bincount(bins_N, minlength=len(GAP_EDGES) + 1))
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    return {f"gap_bin/{edge:g}": share for edge, share in zip((*GAP_EDGES, math.inf), shares, strict=True)}
