"""Losses, routing, tables, templates and traces on whatever a generator thinks of."""

import copy
from typing import Any

import independent
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import dopd
from dopd.data.views import PrivilegedTemplate
from dopd.divergences import DIVERGENCES
from dopd.errors import ConfigError
from dopd.fused import fused_routed_loss
from dopd.inspection.schema import problems
from dopd.loss import routed_loss
from dopd.methods import table
from dopd.rules import Rule
from dopd.tables import RoutingTable
from tests import report_kit

QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LOGITS = st.floats(-12.0, 12.0, width=32) | st.sampled_from([0.0, 1.0])  # the last two make ties


@st.composite
def batches(draw: Any) -> tuple[torch.Tensor, ...]:
    """(student, privileged teacher, privileged student) logits (B, T, V) float64, ids and mask (B, T)."""
    size = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(2, 6))
    count = size[0] * size[1] * size[2]
    flat = [draw(st.lists(LOGITS, min_size=count, max_size=count)) for _ in range(3)]
    logits = [torch.tensor(values, dtype=torch.float64).view(size) for values in flat]
    places = size[0] * size[1]
    ids = draw(st.lists(st.integers(0, size[2] - 1), min_size=places, max_size=places))
    mask = draw(st.lists(st.integers(0, 1), min_size=places, max_size=places))
    assume(any(mask))
    return *logits, torch.tensor(ids).view(size[:2]), torch.tensor(mask).view(size[:2])


def no_ties(logits: torch.Tensor, k: int) -> bool:
    """Whether a top-k support is the same for whoever takes it."""
    ordered = logits.sort(-1, descending=True).values
    return k >= logits.shape[-1] or bool((ordered[..., k - 1] - ordered[..., k] > 1e-9).all())


def near_no_threshold(teacher: torch.Tensor, student: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether rounding cannot change a regime: two computations differ in the last digits."""
    picked = [x.log_softmax(-1).gather(-1, ids[..., None])[..., 0] for x in (teacher, student)]
    gap = (picked[0] - picked[1]).abs()[mask != 0]
    sums = (picked[0].exp() + picked[1].exp())[mask != 0]
    thresholds = dopd.routing.gap_thresholds(*picked, mask)
    far = (gap - thresholds.gap).abs().min() > 1e-9 and (sums - thresholds.confidence).abs().min() > 1e-9
    return bool(far and (gap.min() > 1e-9 or gap.max() == 0))


@QUICK
@given(batches(), st.integers(2, 4), st.sampled_from(["bucket", "renormalize"]))
def test_the_loss_is_the_papers(batch: Any, k: int, tail: str) -> None:
    student, teacher, anchor, ids, mask = batch
    assume(no_ties(student, k) and near_no_threshold(teacher, anchor, ids, mask))
    made = table("dopd", top_k=k, tail=tail)
    targets = {"privileged_teacher": teacher, "privileged_student": anchor}
    found = routed_loss(student, targets, ids, mask, made).loss.item()
    lists = [x.tolist() for x in (student, teacher, anchor, ids, mask)]
    assert found == pytest.approx(independent.dopd_loss(*lists, k=k, tail=tail), rel=1e-9, abs=1e-12)


@QUICK
@given(batches(), st.sampled_from(["dopd", "vanilla", "gkd", "privileged_teacher", "opsd", "eopd"]), st.integers(1, 7))
def test_the_fused_loss_is_the_reference(batch: Any, method: str, chunk: int) -> None:
    student, teacher, anchor, ids, mask = batch
    made = table(method)
    eye = torch.eye(student.shape[-1], dtype=torch.float64)  # hidden states that are logits
    logits = dict.fromkeys(made.sources, teacher) | {"privileged_student": anchor}
    logits = {name: logits[name] for name in made.sources}
    results = []
    for backend in ("reference", "chunked"):
        hidden = student.clone().requires_grad_()
        pairs = {name: (value, eye) for name, value in logits.items()}
        options = {} if backend == "reference" else {"chunk_tokens": chunk}
        result = fused_routed_loss(hidden, eye, pairs, ids, mask, made, backend=backend, **options)
        result.loss.backward()
        results.append((result.loss.item(), hidden.grad, result.regimes))
    (value, grad, regimes), (fused_value, fused_grad, fused_regimes) = results
    assert fused_value == pytest.approx(value, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(fused_grad, grad, rtol=1e-8, atol=1e-12)
    assert (regimes is None and fused_regimes is None) or torch.equal(regimes, fused_regimes)


def between(s: list[float], t: list[float], kind: str) -> float:
    return independent.divergence(independent.softmax(s), independent.softmax(t), kind)


@QUICK
@given(batches(), st.sampled_from(["forward_kl", "reverse_kl", "js"]))
def test_divergences_are_divergences(batch: Any, kind: str) -> None:
    student, target, other, _, _ = batch
    value = DIVERGENCES[kind](student.log_softmax(-1), target.log_softmax(-1))
    assert (value >= -1e-12).all()
    shifted = DIVERGENCES[kind]((student + other[..., :1]).log_softmax(-1), target.log_softmax(-1))
    torch.testing.assert_close(shifted, value)  # a constant on all logits says nothing
    same = DIVERGENCES[kind](target.log_softmax(-1), target.log_softmax(-1))
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)
    expected = [
        [between(s, t, kind) for s, t in zip(*rows, strict=True)]
        for rows in zip(student.tolist(), target.tolist(), strict=True)
    ]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-11)


@QUICK
@given(batches())
def test_every_scored_token_has_one_regime_and_the_order_does_not_matter(batch: Any) -> None:
    _, teacher, anchor, ids, mask = batch
    picked = [x.log_softmax(-1).gather(-1, ids[..., None])[..., 0] for x in (teacher, anchor)]
    regimes = dopd.route(*picked, mask)
    assert ((regimes >= 0) == (mask != 0)).all() and regimes.max() <= 3
    flipped = dopd.route(*(x.flip(0, 1) for x in picked), mask.flip(0, 1))
    assume(near_no_threshold(teacher, anchor, ids, mask))
    assert torch.equal(flipped.flip(0, 1), regimes)


# --- Tables

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SENSIBLE = {
    "regime": st.sampled_from(["LH", "LL", "HT", "HS", None, "hs", 0, 4]),
    "source": st.sampled_from(["teacher", "privileged_teacher", "privileged_student", "initial", None])
    | st.dictionaries(st.sampled_from(["teacher", "privileged_teacher"]), st.floats(0, 1), max_size=2),
    "divergence": st.sampled_from([*DIVERGENCES, "policy_gradient", "kl"]),
    "support": st.sampled_from(["full", "student_topk", "target_topk", "sampled"]),
    "tail": st.sampled_from(["bucket", "renormalize", "truncate"]),
    "top_k": st.integers(0, 130),
    "weight": st.floats(0, 2),
    "beta": st.floats(0, 1),
}
ROWS = st.lists(
    st.fixed_dictionaries({}, optional={name: good | JSON for name, good in SENSIBLE.items()})
    | st.dictionaries(st.sampled_from([*Rule.__dataclass_fields__, "sorce"]), JSON, max_size=5),
    max_size=4,
)


@settings(QUICK, max_examples=300)
@given(ROWS | st.lists(JSON, max_size=2))
@example([{"regime": "LH", "weight": float("nan")}])
@example([{"source": {"teacher": {}}}])
def test_rows_are_a_table_or_an_error_of_ours(rows: Any) -> None:
    before = copy.deepcopy(rows)
    try:
        made = RoutingTable.from_dicts(rows)
    except ConfigError as error:
        assert str(error).startswith(("row", "rules[", "a table", "table", "the table")) and len(str(error)) < 4000
    else:
        assert made.describe() and len(made.rules) == len(rows)
        assert all(rule.weight >= 0 for rule in made.rules)
    assert repr(rows) == repr(before)


# --- Templates


@QUICK
@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=10), st.text(max_size=10), st.booleans())
@example("{privileged_context}", "{prompt}", "", "", True)
@example("\\1 {0} {}", "\\g<0> %s", "", "", True)
def test_prompt_and_p_stand_in_the_view_as_they_are(
    prompt: str, privileged: str, before: str, between: str, blocks: bool
) -> None:
    assume(not {"{prompt}", "{privileged_context}"} & {before, between} and privileged.strip())
    text = before + "{prompt}" + between + "{privileged_context}"
    try:
        template = PrivilegedTemplate(text)
    except ConfigError:
        assume(False)
    expected = before + prompt + between + privileged
    assert template.apply(prompt, privileged) == expected
    content: Any = [{"type": "text", "text": prompt}] if blocks else prompt
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    after: Any = template.apply(turns, privileged)
    shown = after[1]["content"][0]["text"] if blocks else after[1]["content"]
    assert shown == expected and after[0] is turns[0] and turns[1]["content"] == content


# --- Traces


@settings(QUICK, max_examples=300)
@given(st.data())
def test_a_record_with_anything_anywhere_is_judged(data: Any) -> None:
    record: Any = copy.deepcopy(report_kit.record(1, 0))
    place: Any = record
    for _ in range(4):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not (isinstance(inner, dict | list) and inner and data.draw(st.booleans())):
            break
        place = inner
    if data.draw(st.booleans()):
        place[key] = data.draw(JSON)
    else:
        del place[key]
    found = problems(record)
    assert isinstance(found, list) and all(isinstance(sentence, str) for sentence in found)
