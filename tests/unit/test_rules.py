"""Routing tables as data: what is refused, with which words, and what a table knows about itself."""

import math
import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import yaml

import dopd
from dopd.data.checks import check_contexts
from dopd.errors import ConfigError, DataError
from dopd.sources import SOURCES

TEACHER: dict[str, Any] = {"source": "privileged_teacher"}


def four_rows(**changes: Any) -> list[dict[str, Any]]:
    return [TEACHER | {"regime": regime.name} | changes for regime in dopd.Regime]


# --- rows that cannot work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"source": "tutor"},
            r"rule 'all': source \(='tutor'\) must be one of 'teacher', 'privileged_teacher', 'pr",
        ),
        (TEACHER | {"divergence": "kl"}, r"divergence \(='kl'\) must be one of forward_kl, reverse_kl, js"),
        (
            TEACHER | {"support": "topk"},
            r"support \(='topk'\) must be one of 'full', 'student_topk', 'target_topk', 's",
        ),
        (TEACHER | {"tail": "cut"}, r"tail \(='cut'\) must be one of 'bucket', 'renormalize', 'truncate'"),
        (TEACHER | {"top_k": 0}, r"top_k \(=0\) must be a whole number of at least 1"),
        (TEACHER | {"top_k": 12.0}, r"top_k \(=12.0\) must be a whole number of at least 1"),
        (TEACHER | {"weight": -0.1}, r"weight \(=-0.1\) must be finite and at least 0"),
        (TEACHER | {"weight": math.nan}, r"weight \(=nan\) must be finite and at least 0"),
        (TEACHER | {"weight": math.inf}, r"weight \(=inf\) must be finite and at least 0"),
        (TEACHER | {"weight": "1"}, r"weight \(='1'\) must be a number"),
        (TEACHER | {"weight": True}, r"weight \(=True\) must be a number"),
        (
            TEACHER | {"regime": "HIGH"},
            r"regime \(='HIGH'\) must be one of LH, LL, HT, HS, or left out for every token",
        ),
        (TEACHER | {"regime": 4}, r"regime \(=4\) must be one of LH, LL, HT, HS"),
        (TEACHER | {"regime": True}, r"regime \(=True\) must be one of"),
        (TEACHER | {"regime": ["LH"]}, r"regime \(=\['LH'\]\) must be one of"),
        (
            TEACHER | {"regime": "HT", "support": "sampled", "divergence": "cross_entropy"},
            r"rule 'HT': support='sampled' estimates 'forward_kl', 'reverse_kl', 'js' or is the support of "
            r"'policy_gradient' and 'nll', got divergence='cross_entropy'. Use support='target_topk' or 'full'",
        ),
        (TEACHER | {"text": "answer"}, r"text \(='answer'\) must be one of 'rollout', 'reference'"),
        (TEACHER | {"view": "hint"}, r"view \(='hint'\) must be one of 'plain', 'privileged', 'self'"),
        ({"divergence": "nll"}, "divergence='nll' acts on the sampled token: set support='sampled', got 'full'"),
        (TEACHER | {"divergence": "nll", "support": "sampled"}, "divergence='nll' reads no target; leave it out"),
        (
            {"divergence": "nll", "support": "sampled", "clip": [0, 1]},
            r"clip \(=\(0.0, 1.0\)\) must be \(lowest, highest\) advantage, .* with an advantage, .*divergence='nll'",
        ),
        ({"divergence": "js"}, "source is missing: divergence='js' compares the student with a target"),
        (
            TEACHER | {"divergence": "entropy"},
            r"source \(='privileged_teacher'\): divergence='entropy' reads no target",
        ),
        ({"source": "student"}, "source='student' alone is the trained distribution itself: divergence and gradient"),
        ({"source": {"teacher": 1, "tutor": 1}}, r"source \(='tutor'\) must be one of 'teacher'"),
        ({"source": {"teacher": 1, "reference": -1.0}}, "the exponents must sum to more than 0"),
        (
            {"source": {"teacher": "1"}},
            r"the exponent of teacher \(='1'\) must be a finite number, or \{start: .., end: ..\}",
        ),
        ({"source": {"teacher": {"start": 1}}}, "the exponent of teacher .* must have exactly the keys start and end"),
        ({"source": {}}, "must name at least one source"),
        ({"divergence": "policy_gradient", "advantage": "rlsd"}, "acts on the sampled token: set support='sampled'"),
        (
            {"divergence": "policy_gradient", "support": "sampled"},
            r"advantage \(=None\) names the signal of divergence",
        ),
        (TEACHER | {"advantage": "rlsd"}, r"of no other \(got divergence='reverse_kl'\)"),
        (TEACHER | {"scale": "mood"}, r"scale: signal \(='mood'\) must be one of student_entropy, teacher_entropy"),
        (TEACHER | {"scale": {"signal": "tip", "rho": 1}}, "scale: signal 'tip' has no option rho; it has none"),
        (TEACHER | {"select": "tip"}, r"select \(='tip'\) must be a mapping such as"),
        (TEACHER | {"select": {"signal": "tip"}}, r"must have exactly one of top, bottom, above, below"),
        (TEACHER | {"select": {"signal": "tip", "top": 0.5, "above": 1}}, r"must have exactly one of top, bottom"),
        (TEACHER | {"select": {"signal": "tip", "top": 1.5}}, r"select: top \(=1.5\) must be in \(0, 1\]"),
        (TEACHER | {"select": {"signal": "tip", "above": "x"}}, r"select: above \(='x'\) must be a number"),
        (TEACHER | {"clip": 3.0, "support": "sampled"}, r"clip \(=3.0\) must be a pair \(lowest, highest\)"),
        (TEACHER | {"beta": 0.3}, "beta .* is an option of divergence='js'"),
        (
            TEACHER | {"support": "student_topk", "top_k": 1, "tail": "renormalize"},
            "top_k=1 with tail='renormalize' compares a single outcome.*Use tail='bucket' or a larger top_k",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else re.sub(r"\W+", "_", value)[:40],
)
def test_row_that_cannot_work_is_refused_when_it_is_made(row: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dopd.Rule(**row)
    with pytest.raises(ConfigError, match=words):
        dopd.RoutingTable.from_dicts([row])


def test_row_that_teaches_the_plain_student_to_itself_cannot_be_written() -> None:
    """KL(p || sg p) is a no-op; in a product the plain student is a target like another."""
    for source in ("student", {"student": 1}, {"student": {"start": 1, "end": 1}}):
        with pytest.raises(ConfigError, match="divergence and gradient would be 0"):
            dopd.Rule(source=source)
    assert dopd.Rule(source={"teacher": 1, "student": 0.5}).target_names == {"teacher"}


def test_regime_of_a_row_by_name_number_or_member() -> None:
    for value in ("HT", 2, dopd.Regime.HT):
        assert dopd.Rule(regime=value, **TEACHER).regime is dopd.Regime.HT
    assert dopd.Rule(**TEACHER).regime is None and dopd.Rule(**TEACHER).label == "all"


def test_rows_and_tables_are_frozen() -> None:
    table = dopd.table("dopd")
    with pytest.raises(FrozenInstanceError):
        table.rules[0].weight = 2.0  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        table.anchor = "ema"  # type: ignore[misc]


# --- tables that cannot work ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "table 'custom' has no rules: give it one without a regime, or one for each regime"),
        ([TEACHER, TEACHER], {}, "several rules are called all; rules without a regime add up, so give each a name"),
        ([*four_rows(), TEACHER | {"regime": "HS"}], {}, "HS has several rules; give a regime's tokens exactly one"),
        (four_rows()[:2], {}, "has no rule for HT, HS; weight=0 leaves those tokens out"),
        (four_rows(weight=0), {}, "every weight is 0, nothing would be learned; give one rule a weight above 0"),
        ([TEACHER | {"weight": 0.0}], {}, "every weight is 0"),
        ([TEACHER], {"anchor": "frozen"}, "anchor='frozen' names the weights of the privileged student.*no rule reads"),
        ([TEACHER], {"anchor": "live"}, r"anchor \(='live'\) must be one of 'current', 'frozen', 'ema'"),
        ([TEACHER], {"context": "web"}, r"context \(='web'\) must be one of 'column', 'sibling', 'none'"),
        ([TEACHER], {"trim": 1.0}, r"table 'custom': trim \(=1.0\) must be a number in \[0, 1\)"),
        ([TEACHER], {"trim": -0.1}, r"trim \(=-0.1\) must be a number in"),
        ([TEACHER], {"trim": "5%"}, r"trim \(='5%'\) must be a number in"),
        ([TEACHER], {"trim": math.nan}, r"trim \(=nan\) must be a number in"),
        (
            [TEACHER | {"wieght": 1, "K": 3}],
            {},
            r"rules\[0\]: unknown key K, wieght; allowed: regime, source, divergence, support, tail, top_k, weight",
        ),
        ([TEACHER, {"name": "b"}], {}, "rule 'b': source is missing: divergence='reverse_kl' compares the student"),
        (["teacher"], {}, r"rules\[0\] \(='teacher'\) must be a mapping with the keys regime, source"),
    ],
)
def test_table_that_cannot_work_is_refused_when_it_is_made(rows: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dopd.RoutingTable.from_dicts(rows, **options)


@pytest.mark.parametrize("provided", [[], ["teacher"], ["privileged_teacher"]])
def test_table_whose_source_nobody_provides_is_refused(provided: list[str]) -> None:
    words = rf"table 'dopd' needs .*privileged_student \(the student, .* provided: {', '.join(provided) or 'nothing'}$"
    with pytest.raises(ConfigError, match=words):
        dopd.table("dopd").check_provided(provided)
    dopd.table("dopd").check_provided(SOURCES)


# --- what a table knows -----------------------------------------------------------------------------------------------


def test_table_scores_no_view_that_it_does_not_need() -> None:
    assert dopd.table("vanilla").sources == {"teacher"}
    assert dopd.table("dopd").sources == {"privileged_teacher", "privileged_student"}
    assert dopd.table("privileged_student").sources == {"privileged_student"}
    assert not dopd.table("privileged_student").needs_teacher and dopd.table("vanilla").needs_teacher


def test_row_of_weight_zero_needs_no_target_but_routing_still_reads_both_views() -> None:
    rows = dopd.table("dopd").to_dicts()
    for row in rows:
        row["weight"] = 1.0 if row["source"] == "privileged_teacher" else 0.0
    table = dopd.RoutingTable.from_dicts(rows)
    assert table.target_sources == {"privileged_teacher"}
    assert table.routing_sources == table.sources == {"privileged_teacher", "privileged_student"}
    for row in rows:
        row["source"] = "teacher" if row["weight"] else "privileged_student"
    assert dopd.RoutingTable.from_dicts(rows).target_sources == {"teacher"}


def test_every_regime_has_exactly_one_row() -> None:
    table = dopd.table("dopd")
    assert [[rule.label for _, rule in layer] for layer in table.rule_groups] == [["LH", "LL", "HT", "HS"]]
    assert not dopd.table("vanilla").routed and table.routed


def test_rows_without_a_regime_add_up_beside_the_regimes() -> None:
    extra = {"name": "reward", "divergence": "policy_gradient", "support": "sampled", "advantage": "group_advantage"}
    table = dopd.RoutingTable.from_dicts([extra, *four_rows(), TEACHER | {"name": "all of it"}])
    labels = [[(index, rule.label) for index, rule in layer] for layer in table.rule_groups]
    assert labels == [[(1, "LH"), (2, "LL"), (3, "HT"), (4, "HS")], [(0, "reward")], [(5, "all of it")]]
    assert table.routed and table.needs_rewards and not dopd.table("dopd").needs_rewards


def test_table_knows_what_its_signals_read() -> None:
    rows = [
        {"source": {"teacher": 1.25, "reference": -0.25}, "name": "product", "select": {"signal": "tip", "top": 0.5}},
        {"source": "privileged_student", "name": "self", "scale": "contrast", "weight": 0.5},
    ]
    table = dopd.RoutingTable.from_dicts(rows)
    assert table.target_sources == {"teacher", "reference", "privileged_student"}
    assert table.scored_sources == {"student"} and table.measures == {"reverse_kl", "contrast_kl"}
    assert table.measured_sources == {"student", "teacher", "privileged_student", "contrast_student"}
    assert table.views == {"plain", "privileged", "contrast"} and table.needs_privileged


@pytest.mark.parametrize(
    "row",
    [
        {"source": {"teacher": 1.0, "student": {"start": 0.8, "end": 0.0}}},
        {"source": "teacher", "support": "sampled", "clip": [-1.5, None]},
        {"source": "teacher", "select": {"signal": "position", "growth": 256, "below": 1.0}, "name": "opening"},
        {"divergence": "policy_gradient", "support": "sampled", "advantage": {"signal": "rlsd", "mix": 0.25}},
        {"source": "teacher", "divergence": "js", "beta": 0.9, "scale": "student_surer", "cap": 20.0},
    ],
)
def test_row_with_signals_and_options_survives_yaml(row: dict[str, Any]) -> None:
    table = dopd.RoutingTable.from_dicts([row])
    rows = yaml.safe_load(yaml.safe_dump(table.to_dicts()))
    again = dopd.RoutingTable.from_dicts(rows)
    assert again.rules == table.rules and again.describe() == table.describe() and row.items() <= rows[0].items()


@pytest.mark.parametrize("method", ["dopd", "dopd_frozen", "dopd_ema", "vanilla", "privileged_teacher"])
def test_table_survives_yaml(method: str) -> None:
    table = dopd.table(method, top_k=7, tail="renormalize")
    rows = yaml.safe_load(yaml.safe_dump(table.to_dicts()))
    again = dopd.RoutingTable.from_dicts(rows, name=table.name, anchor=table.anchor, trim=table.trim)
    assert again.rules == table.rules and again.sources == table.sources
    assert again.describe() == table.describe()


def test_rows_written_by_hand_in_yaml_have_the_same_defaults_as_in_python() -> None:
    rows = yaml.safe_load("- {source: teacher}")
    assert dopd.RoutingTable.from_dicts(rows, name="vanilla").rules == dopd.table("vanilla").rules
    assert dopd.RoutingTable.from_dicts(rows).name == "custom"


def test_describe_says_what_each_token_is_taught() -> None:
    assert dopd.table("dopd").describe().splitlines() == [
        "dopd: routed by the privilege advantage gap, trim 0.05, privileged student: current",
        "  rule  target              divergence  support                   weight",
        "  LH    privileged_teacher  reverse_kl  student_topk 128, bucket  0.6",
        "  LL    privileged_student  reverse_kl  student_topk 128, bucket  0.3",
        "  HT    privileged_teacher  js          full                      1",
        "  HS    privileged_student  reverse_kl  student_topk 128, bucket  0.6",
    ]
    assert dopd.table("vanilla").describe().splitlines() == [
        "vanilla: not routed",
        "  rule  target   divergence  support  weight",
        "  all   teacher  reverse_kl  full     1",
    ]
    assert "privileged student: ema" in dopd.table("dopd_ema").describe()


# --- texts and trained views ------------------------------------------------------------------------------------------


def three_parts() -> dopd.RoutingTable:
    rules = (
        dopd.Rule(name="nll", divergence="nll", support="sampled", text="reference"),
        dopd.Rule(name="base", source="reference", view="self"),
        dopd.Rule(name="own", source={"self_student": 1.0, "student": 0.5}, text="reference", view="privileged"),
        dopd.Rule(name="soft", source="teacher", text="reference"),
        dopd.Rule(name="off", source="privileged_reference", weight=0.0),
    )
    return dopd.RoutingTable(name="three", rules=rules, anchor="snapshot")


def test_a_table_has_a_part_for_each_text_and_view_that_something_is_learned_of() -> None:
    whole = three_parts()
    parts = {(part.text, part.view): part for part in whole.parts}
    labels = {key: [rule.label for rule in part.rules] for key, part in parts.items()}
    assert labels == {
        ("reference", "plain"): ["nll", "soft"],
        ("rollout", "self"): ["base"],
        ("reference", "privileged"): ["own"],
    }
    assert whole.views == {"plain", "self", "privileged"} and whole.needs_privileged and whole.needs_teacher
    assert parts["rollout", "self"].views == {"plain", "self"}
    assert parts["reference", "privileged"].sources == {"self_student"}
    assert parts["reference", "privileged"].view_of("student") == "privileged"
    assert whole.needs_references and whole.needs_rollouts
    assert dopd.table("dopd").parts == [dopd.table("dopd")]
    texts = [line.split()[-2:] for line in whole.describe().splitlines()[1:]]
    assert texts[:3] == [["text", "view"], ["reference", "plain"], ["rollout", "self"]]
    again = dopd.RoutingTable.from_dicts(
        yaml.safe_load(yaml.safe_dump(whole.to_dicts())), name="three", anchor="snapshot"
    )
    assert again == whole


def test_a_table_of_reference_texts_alone_needs_no_rollouts_unless_somebody_reads_them() -> None:
    nll = dopd.Rule(divergence="nll", support="sampled", text="reference")
    assert not dopd.RoutingTable(name="sft", rules=(nll,)).needs_rollouts
    own = dopd.Rule(source="self_student", text="reference")
    assert dopd.RoutingTable(name="own", rules=(own,)).needs_rollouts
    select = {"signal": "shortest_right", "above": 0.5}
    judged = dopd.Rule(divergence="nll", support="sampled", text="reference", select=select)
    assert dopd.RoutingTable(name="judged", rules=(judged,)).needs_rollouts


def test_texts_and_views_that_cannot_stand_together_are_refused() -> None:
    rows = four_rows()
    rows[1]["text"] = "reference"
    with pytest.raises(ConfigError, match="rules by regime have reference, plain; rollout, plain as text and view"):
        dopd.RoutingTable.from_dicts(rows)
    rule = dopd.Rule(source="teacher", view="privileged")
    with pytest.raises(ConfigError, match=r"student_view='privileged' is the prompt of every rule: give all"):
        dopd.RoutingTable(name="both", rules=(rule,), student_view="privileged")


def test_the_loss_of_several_parts_is_asked_for_part_by_part() -> None:
    table, logits = three_parts(), torch.zeros(1, 2, 3)
    with pytest.raises(
        ConfigError, match=r"trains on several texts or views \(text reference, view plain; .*table.parts"
    ):
        dopd.routed_loss(logits, {}, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2), table)


def test_likelihood_is_that_of_the_texts_tokens_with_its_gradient() -> None:
    rule = dopd.Rule(divergence="nll", support="sampled", text="reference", weight=0.5)
    table = dopd.RoutingTable(name="sft", rules=(rule,))
    logits = torch.tensor([[[0.5, -1.0, 0.25], [0.0, 2.0, 1.0]], [[1.0, 1.0, 0.0], [9.0, 9.0, 9.0]]]).double()
    leaf, ids, mask = logits.requires_grad_(), torch.tensor([[2, 0], [1, 7]]), torch.tensor([[1, 1], [1, 0]])
    result = dopd.routed_loss(leaf, {}, ids, mask, table)
    result.loss.backward()
    probabilities = [
        [math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits.detach().flatten(0, 1).tolist()
    ]
    losses = [-math.log(probabilities[0][2]), -math.log(probabilities[1][0]), -math.log(probabilities[2][1])]
    assert float(result.loss.detach()) == pytest.approx(0.5 * ((losses[0] + losses[1]) / 2 + losses[2]) / 2, rel=1e-12)
    expected = torch.tensor(probabilities, dtype=torch.float64).view(2, 2, 3)
    for place, token in (((0, 0), 2), ((0, 1), 0), ((1, 0), 1)):
        expected[place][token] -= 1.0
    scale = torch.tensor([[0.125, 0.125], [0.25, 0.0]]).double().unsqueeze(-1)  # 0.5 / 2 sequences / their tokens
    torch.testing.assert_close(leaf.grad, expected * scale, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("place", [{"text": "reference"}, {"view": "privileged"}, {"view": "self"}], ids=str)
@pytest.mark.parametrize("estimate", [{"support": "sampled"}, {"support": "target_topk", "tail": "sampled"}], ids=str)
def test_estimates_need_tokens_that_the_trained_distribution_has_drawn(
    place: dict[str, Any], estimate: dict[str, Any]
) -> None:
    dopd.Rule(source="teacher", **estimate)
    dopd.Rule(source="teacher", **place)
    with pytest.raises(ConfigError, match="tokens that the trained distribution has drawn"):
        dopd.Rule(source="teacher", **estimate, **place)


CONTEXTS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("ar_opd", {}, ["partial_context"]),
    ("opsd_contrast", {"hints": "column"}, ["contrast_context"]),
    ("dopd", {}, []),
]


@pytest.mark.parametrize(("method", "options", "columns"), CONTEXTS)
def test_the_columns_of_contexts_are_those_that_rows_have_to_bring(
    method: str, options: dict[str, Any], columns: list[str]
) -> None:
    assert dopd.table(method, **options).context_columns == columns
    check_contexts([*columns, "prompt"], columns, method)
    for name in columns:
        with pytest.raises(DataError, match=f"column '{name}' is missing and method '{method}' reads it"):
            check_contexts(["prompt", "privileged_context"], columns, method)
