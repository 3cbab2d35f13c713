"""The fused loss against the reference for every method: rows that add up, signals, products, merged tokens."""

import pytest
import torch
from fused_kit import DOUBLE, Case, assert_same, make_case, one_rule
from methods_kit import random_logits

from dopd.fused import score_tokens
from dopd.methods import METHODS
from dopd.methods import table as method
from dopd.sources import SOURCES
from dopd.tables import RoutingTable


def every_source(case: Case) -> None:
    """Give the case hidden states and heads for all sources that there are, in place."""
    teacher_head = case.targets["teacher"][1]
    for source, spec in SOURCES.items():
        head = teacher_head if spec.model == "teacher" else case.head
        case.targets[source] = (torch.randn(*case.mask.shape, head.weight.shape[1], dtype=DOUBLE), head)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_agrees_with_the_reference(name: str) -> None:
    """Rows that add up, products of sources, selections, scales and advantages, whatever the chunk."""
    for table in method(name).parts:
        check_against_the_reference(table)


def check_against_the_reference(table: RoutingTable) -> None:
    logits, case = random_logits(3, tokens=4, vocab=61), make_case((8, 4, 6, 61), softcap=6.0)
    case.mask, case.ids = logits.mask, torch.where(logits.mask != 0, logits.ids, 61 + 7)
    every_source(case)
    case.targets = {source: case.targets[source] for source in table.target_sources}
    assignment = logits.assignment(table, progress=0.25, step=10)
    reference = case.run(table, "reference", assignment=assignment, upstream=1.7)
    scores = {source: score_tokens(*pair, case.ids, case.mask) for source, pair in case.targets.items()}
    for options in ({}, {"chunk_tokens": 3}, {"chunk_tokens": 5, "scores": scores}):
        assert_same(case.run(table, "chunked", assignment=assignment, upstream=1.7, **options), reference, 1e-9)


@pytest.mark.parametrize("name", [name for name in METHODS if not method(name).is_judged])
def test_decisions_made_from_hidden_states_are_those_made_from_logits(name: str) -> None:
    for table in method(name).parts:
        case = make_case((4, 5, 6, 61))
        every_source(case)
        del case.targets["student"]  # the trained distribution itself
        assert_same(case.run(table, "chunked", chunk_tokens=4), case.run(table, "reference"), 1e-9)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js"])
def test_merged_end_tokens_agree_with_the_reference(kind: str) -> None:
    table, merged = one_rule(kind, "sampled", "bucket"), [3, 11, 40]
    for head in ({}, {"softcap": 4.0, "temperature": 1.3}):
        case = make_case(**head)
        case.ids[0, 0], case.ids[1, 1], case.ids[2, 2] = merged
        reference = case.run(table, "reference", merged_ids=merged)
        scores = {"teacher": score_tokens(*case.targets["teacher"], case.ids, case.mask, merged_ids=merged)}
        for options in ({"chunk_tokens": 3}, {"scores": scores}):
            assert_same(case.run(table, "chunked", merged_ids=merged, **options), reference)
        apart = case.run(table, "reference")
        changed = (apart.result.per_token - reference.result.per_token).abs() > 1e-9
        assert {(0, 0), (1, 1), (2, 2)} <= {tuple(place) for place in changed.nonzero().tolist()}
