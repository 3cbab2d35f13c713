"""The named tables: the paper's settings, and what may be changed about them."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

import dopd
from dopd.cli.show import methods_as_markdown
from dopd.errors import ConfigError
from dopd.methods import CARDS, METHODS
from dopd.registry import Registry
from dopd.signals import SIGNALS
from dopd.sources import SOURCES


def test_defaults_are_the_papers_settings() -> None:
    table = dopd.table("dopd")
    rows = {rule.label: (rule.source, rule.divergence, rule.support, rule.weight) for rule in table.rules}
    assert rows == {
        "LH": ("privileged_teacher", "reverse_kl", "student_topk", 0.6),
        "LL": ("privileged_student", "reverse_kl", "student_topk", 0.3),
        "HT": ("privileged_teacher", "js", "full", 1.0),
        "HS": ("privileged_student", "reverse_kl", "student_topk", 0.6),
    }
    assert {rule.top_k for rule in table.rules} == {128}
    assert (table.name, table.anchor, table.trim) == ("dopd", "current", 0.05)


def test_vanilla_is_one_row_of_the_plain_teacher() -> None:
    (rule,) = dopd.table("vanilla").rules
    assert (rule.regime, rule.source, rule.divergence) == (None, "teacher", "reverse_kl")
    assert (rule.support, rule.weight) == ("full", 1.0)


@pytest.mark.parametrize("source", ["privileged_teacher", "privileged_student"])
def test_naive_privileged_baselines_teach_every_token_alike(source: str) -> None:
    table = dopd.table(source)
    assert table.sources == {source} and not table.routed and table.rules[0].weight == 1.0


@pytest.mark.parametrize("anchor", ["frozen", "ema"])
def test_departure_from_the_paper_carries_another_name(anchor: str) -> None:
    table = dopd.table(f"dopd_{anchor}")
    assert (table.name, table.anchor) == (f"dopd_{anchor}", anchor)
    assert table.rules == dopd.table("dopd").rules and "DEPARTURE" in table.source_note
    assert "DEPARTURE" not in dopd.table("dopd").source_note
    with pytest.raises(ConfigError, match=f"method 'dopd_{anchor}' has no option anchor; it has "):
        dopd.table(f"dopd_{anchor}", anchor="current")


def test_options_reach_the_rows() -> None:
    table = dopd.table(
        "dopd", top_k=16, tail="renormalize", strong_weight=2.0, light_weight=0.5, weak_weight=0.1, trim=0.2
    )
    assert [rule.weight for rule in table.rules] == [0.5, 0.1, 2.0, 0.5]
    light = [rule for rule in table.rules if rule.support != "full"]
    assert len(light) == 3 and all((rule.top_k, rule.tail) == (16, "renormalize") for rule in light)
    assert table.trim == 0.2
    (rule,) = dopd.table("vanilla", divergence="js", support="target_topk", top_k=5, tail="renormalize").rules
    assert (rule.divergence, rule.support, rule.top_k, rule.tail) == ("js", "target_topk", 5, "renormalize")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_builds_names_itself_and_says_where_it_is_from(name: str) -> None:
    table = dopd.table(name)
    assert table.name == name and table.source_note
    card = CARDS[name]
    assert card.about and card.equation and table.source_note == card.note
    for option in inspect.signature(METHODS[name]).parameters.values():
        assert option.kind is option.KEYWORD_ONLY and option.default is not option.empty, option


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_plain_rows_that_a_yaml_file_could_hold(name: str) -> None:
    """Nothing hides in code: the table made again from its rows and options is the same."""
    table = dopd.table(name)
    rows = yaml.safe_load(yaml.safe_dump(table.to_dicts()))
    options = {field.name: getattr(table, field.name) for field in dataclasses.fields(table) if field.name != "rules"}
    again = dopd.RoutingTable.from_dicts(rows, **options)
    assert again == table and again.sources == table.sources and again.measures == table.measures


def test_the_docs_list_the_methods_as_they_are() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "methods.md").read_text(encoding="utf-8")
    assert methods_as_markdown() in text, "put the output of `dopd methods --markdown` into docs/reference/methods.md"


def test_the_docs_name_every_signal_and_source() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in (*SIGNALS, *SOURCES) if f"`{name}`" not in text] == []


def test_privileged_student_of_any_method_may_have_other_weights_and_the_name_says_so() -> None:
    table = dopd.table("sdft", anchor="frozen")
    assert (table.name, table.anchor) == ("sdft", "frozen")  # an option of that method
    table = dopd.table("sdpo", anchor="frozen")
    assert (table.name, table.anchor, table.ema_decay) == ("sdpo_frozen", "frozen", None)
    assert "DEPARTURE: frozen" in table.source_note
    assert dopd.table("sdpo", anchor="ema") == dopd.table("sdpo")


@pytest.mark.parametrize(("typo", "meant"), [("dpod", "dopd"), ("vanila", "vanilla"), ("privileged_techer", "privil")])
def test_unknown_method_suggests_the_closest(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"method \(='{typo}'\) must be one of dopd, .*Did you mean .*'{meant}"):
        dopd.table(typo)


def test_unknown_method_that_resembles_nothing_suggests_nothing() -> None:
    with pytest.raises(ConfigError, match=r"must be one of dopd, .*\.$") as caught:
        dopd.table("zzz")
    assert "Did you mean" not in str(caught.value)


def test_unknown_option_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="method 'dopd' has no option K, beta; it has top_k, tail, strong_weight, "):
        dopd.table("dopd", beta=0.5, K=3)
    with pytest.raises(ConfigError, match="method 'vanilla' has no option trim; it has divergence, support"):
        dopd.table("vanilla", trim=0.1)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dopd", {"top_k": 0}, "method_options of dopd: top_k"),
        ("dopd", {"weak_weight": -1.0}, "method_options of dopd: weak_weight"),
        ("dopd", {"trim": 2}, "table 'dopd': trim"),
        ("dopd", {"tail": "none"}, "method_options of dopd: tail"),
        ("vanilla", {"support": "sampled", "divergence": "entropy"}, "rule 'all': support='sampled' estimates"),
        ("vanilla", {"anchor": "ema"}, "table 'vanilla_ema': anchor='ema' names the weights of the privileged student"),
    ],
)
def test_option_with_a_value_that_cannot_work_is_refused_with_its_row(
    name: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        dopd.table(name, **options)


def test_a_former_name_is_refused_with_the_new_one() -> None:
    registry: Registry[str] = Registry("method")
    registry.register("sum_of_six", "", test_a_former_name_is_refused_with_the_new_one)
    registry.rename("six", "sum_of_six", "it says what is done with them")
    with pytest.raises(ConfigError, match="method \\(='six'\\) is called 'sum_of_six' now: it says what is done"):
        registry.check_name("six")
