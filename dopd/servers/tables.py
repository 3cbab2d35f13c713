"""What a routing table can get from a teacher on a server, worked out from its rules.

A server gives log-probs of the sampled tokens and of its own most probable tokens. It gives no hidden states, no
entropies, and no log-probs of the student's most probable tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from dopd.errors import ConfigError
from dopd.rules import Rule
from dopd.signals import MEASURES
from dopd.sources import TEACHER_SOURCES
from dopd.tables import RoutingTable

ServerSupport = Literal["exact", "target_topk", "target_topk_sampled"]
# Divergences that compare masses, to which those of all other tokens may be added up as one outcome's.
_OF_MASSES = ("forward_kl", "reverse_kl", "js", "reverse_kl_detached")
# Divergences that a sampled token estimates, in value and gradient.
_ESTIMATED = ("forward_kl", "reverse_kl", "js")
_AT_HOME = "or load the teacher here (teacher_model_name_or_path in place of teacher_server)"


@dataclass(frozen=True)
class ServedTable:
    """A table as it is trained with a teacher on a server.

    Attributes:
        table (`RoutingTable`): with rules that a server can give the targets of; `NAME_served` where some of them had
            to be others.
        notes (`list[str]`): for each rule that reads the teacher, what it gets, in a line.
        top_k (`int`): how many of the teacher's most probable tokens are asked for; 0 where the sampled ones are
            enough.
    """

    table: RoutingTable
    notes: list[str]
    top_k: int


def served_table(table: RoutingTable, support: ServerSupport, top_k: int) -> ServedTable:
    """A table with its teacher on a server.

    Args:
        table (`RoutingTable`): the method.
        support (`str`): `"exact"` takes the rules as they are; `"target_topk"` reads rules over the whole vocabulary,
            or over the student's top k, over the teacher's `top_k` most probable tokens, with one outcome for all
            others; `"target_topk_sampled"` besides corrects that outcome by the sampled tokens, so that the mean over
            samples is the divergence over the whole vocabulary.
        top_k (`int`): of rules that are changed.

    Raises:
        ConfigError: a server cannot give what a rule reads; the rule's name and what to do.
    """
    problems = [*_problems_beside_targets(table)]
    rules, notes = [], []
    for rule in table.rules:
        if not _reads_teacher(rule):
            rules.append(rule)
            continue
        changed = _served_rule(rule, support, top_k)
        if isinstance(changed, str):
            problems.append(f"rule {rule.label!r} {changed}")
            continue
        rules.append(changed)
        notes.append(f"rule {rule.label!r}: {_note(rule, changed, support)}")
    if problems:
        raise ConfigError(f"teacher_server: method {table.name!r} cannot be served: {'; '.join(problems)}")
    if table.routed:
        notes.insert(0, "regimes: the teacher's log-probs of the sampled tokens, exactly")
    name = table.name if tuple(rules) == table.rules else f"{table.name}_served"
    listed = [rule.top_k for rule in rules if _reads_teacher(rule) and rule.support == "target_topk"]
    return ServedTable(replace(table, name=name, rules=tuple(rules)), notes, max(listed, default=0))


def support_in_words(table: RoutingTable) -> str:
    """What a table that reads a teacher gets of one on a server, in a few words."""
    choices: tuple[tuple[ServerSupport, str], ...] = (
        ("exact", "exactly"),
        ("target_topk", "with teacher_server_support=target_topk"),
    )
    for support, words in choices:
        try:
            served_table(table, support, 1)
        except ConfigError:
            continue
        return words
    return "no"


def _reads_teacher(rule: Rule) -> bool:
    return bool(rule.weight and rule.target_names & TEACHER_SOURCES)


def _problems_beside_targets(table: RoutingTable) -> Iterator[str]:
    if table.merge_ends and table.needs_teacher:
        yield f"merge_ends adds up log-probs of several end tokens, and a server gives one: set it to false {_AT_HOME}"
    for rule in table.rules:
        for use in rule.uses:
            whole = [name for name in sorted(use.signal.measures) if TEACHER_SOURCES & set(MEASURES[name].sources)]
            if whole or use.signal.entropies & TEACHER_SOURCES:
                what = f"the measure {whole[0]!r}, of the teacher's" if whole else "the entropy of the teacher's"
                yield (
                    f"rule {rule.label!r}: signal {use.name!r} reads {what} whole distribution, which a server does "
                    f"not give: choose another method, {_AT_HOME}"
                )


def _served_rule(rule: Rule, support: ServerSupport, top_k: int) -> Rule | str:
    """The rule as a server can give its target, or why it cannot."""
    if rule.support == "sampled":
        return rule
    if rule.target is None or rule.target.single is None:
        return (
            f"multiplies whole distributions (source {rule.target}), which a server does not give: use "
            f"support='sampled', {_AT_HOME}"
        )
    if rule.support == "target_topk":
        return rule
    over = "the whole vocabulary" if rule.support == "full" else f"the student's top {rule.top_k}"
    if support == "exact":
        return (
            f"takes its target over {over} (support={rule.support!r}), which a server does not give: set "
            f"teacher_server_support=target_topk for the teacher's own top {top_k} with one outcome for all other "
            f"tokens, choose a method that reads sampled tokens (vanilla_pg), {_AT_HOME}"
        )
    if rule.support == "full" and rule.divergence not in _OF_MASSES:
        return (
            f"takes divergence={rule.divergence!r} over the whole vocabulary, which has no meaning with one outcome "
            f"for all other tokens: choose another divergence, {_AT_HOME}"
        )
    bounded = rule.clamp is not None or rule.cap is not None
    if support == "target_topk_sampled" and (bounded or rule.divergence not in _ESTIMATED):
        return (
            f"(divergence={rule.divergence!r}{', bounded by clamp or cap' if bounded else ''}) is not estimated from "
            f"sampled tokens, as unbounded {', '.join(_ESTIMATED)} are: set teacher_server_support=target_topk, "
            f"{_AT_HOME}"
        )
    changed: dict[str, Any] = {"support": "target_topk", "top_k": top_k}
    if support == "target_topk_sampled":
        return replace(rule, **changed, tail="sampled")
    return replace(rule, **changed | ({"tail": "bucket"} if rule.support == "full" else {}))


def _note(rule: Rule, changed: Rule, support: ServerSupport) -> str:
    if changed.support == "sampled":
        return "log-probs of the sampled tokens, exactly"
    listed = f"the teacher's {changed.top_k} most probable tokens"
    if changed == rule:
        return f"{listed}, exactly"
    over = "the whole vocabulary" if rule.support == "full" else f"the student's top {rule.top_k}"
    tail = {
        "bucket": ", and one outcome for all others",
        "truncate": ", alone",
        "renormalize": ", renormalised",
        "sampled": ", one outcome for all others, and the sampled tokens among these",
    }
    return f"{listed}{tail[changed.tail]}, in place of {over} (teacher_server_support={support})"
