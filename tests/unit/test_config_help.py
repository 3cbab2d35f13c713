"""`help(DOPDConfig)` begins with what is dopd's own, in groups; its descriptions are those of every other list."""

import dataclasses
import inspect
import pydoc
import re

import pytest
from transformers import TrainingArguments
from trl import DistillationConfig

from dopd import DOPDConfig
from dopd.runs.settings import all_settings

OWN = [one for one in dataclasses.fields(DOPDConfig) if one.name in inspect.get_annotations(DOPDConfig)]


def test_help_begins_with_our_groups() -> None:
    lines = pydoc.plain(pydoc.render_doc(DOPDConfig)).splitlines()
    head = "\n".join(lines[:20])
    assert "> Parameters that control the method" in head and "method (`str`" in head
    groups = [line.split("> ")[1] for line in lines if "> Parameters" in line]
    assert len(groups) == 7 and "host" in groups[-1]


@pytest.mark.parametrize("name", [one.name for one in OWN])
def test_every_own_field_is_described_once_and_its_default_is_the_one_that_is_said(name: str) -> None:
    (field,) = (one for one in OWN if one.name == name)
    text = inspect.getdoc(DOPDConfig) or ""
    (entry,) = re.findall(rf"^ +{name} \((.*)\):$", text, re.M)
    said = re.search(r"defaults to `?([^`]+)`?$", entry)
    if said is not None and said[1] != "64 MiB":
        assert eval(said[1]) == field.default
    about = all_settings()[name].about
    assert about and about == field.metadata["help"] and about.split()[0] in text


def test_the_fields_of_the_host_keep_their_own_descriptions() -> None:
    for cls in (TrainingArguments, DistillationConfig):
        (theirs,) = (one for one in dataclasses.fields(cls) if one.name == "learning_rate")
        assert "the paper's" not in theirs.metadata["help"]
    ours, theirs = (
        next(one for one in dataclasses.fields(cls) if one.name == "metric_for_best_model")
        for cls in (DOPDConfig, TrainingArguments)
    )
    assert ours.metadata["help"] == theirs.metadata["help"]
