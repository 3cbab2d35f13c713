"""Corrupted privileged context: what each kind does, to how many rows, and that evaluation rows stay clean."""

from typing import Any

import pytest
from datasets import Dataset

from dopd.errors import ConfigError, DataError
from dopd.runs.noise import PrivilegedNoise, corrupt
from dopd.runs.rows import load_rows
from dopd.runs.settings import load_settings

HINTS = [f"plan {a} {b} {c}" for a, b, c in ("ABC", "DEF", "GHI", "JKL", "MNO", "PQR", "STU", "VWX")]


def rows(hints: list[Any]) -> Dataset:
    return Dataset.from_list([{"prompt": f"x{i}", "privileged_context": hint} for i, hint in enumerate(hints)])


def changed(noise: PrivilegedNoise, hints: list[Any] = HINTS) -> list[Any]:
    after, _ = corrupt(rows(hints), noise)
    assert list(after["prompt"]) == [f"x{i}" for i in range(len(hints))]
    return list(after["privileged_context"])


def test_dropped_leaves_the_share_of_rows_without_p() -> None:
    after, count = corrupt(rows(HINTS), PrivilegedNoise(kind="dropped", share=0.5))
    assert count == 4 and list(after["privileged_context"]).count(None) == 4


def test_wrong_takes_the_p_of_another_row_and_never_the_own_one() -> None:
    for seed in range(20):
        after = changed(PrivilegedNoise(kind="wrong", seed=seed))
        assert all(new in HINTS and new != old for new, old in zip(after, HINTS, strict=True))


def test_shuffled_keeps_the_words_and_changes_their_order() -> None:
    after = changed(PrivilegedNoise(kind="shuffled"))
    assert [sorted(new.split()) for new in after] == [sorted(old.split()) for old in HINTS]
    assert after != HINTS


def test_noisy_replaces_about_its_strength_of_the_words() -> None:
    hints = [" ".join(f"w{i}-{j}" for j in range(50)) for i in range(40)]
    after = changed(PrivilegedNoise(kind="noisy", strength=0.3), hints)
    pairs = [
        (a, b) for new, old in zip(after, hints, strict=True) for a, b in zip(new.split(), old.split(), strict=True)
    ]
    assert sum(a != b for a, b in pairs) / len(pairs) == pytest.approx(0.3, abs=0.03)


def test_equal_seeds_give_equal_rows_and_others_do_not() -> None:
    noise = PrivilegedNoise(kind="wrong", share=0.5)
    assert changed(noise) == changed(noise) != changed(PrivilegedNoise(kind="wrong", share=0.5, seed=1))


def test_rows_without_p_stay_and_do_not_count() -> None:
    after, count = corrupt(rows([None, " ", *HINTS]), PrivilegedNoise(kind="shuffled", share=1.0))
    assert count == len(HINTS) and list(after["privileged_context"])[:2] == [None, " "]


def test_nothing_to_corrupt_is_an_error() -> None:
    with pytest.raises(DataError, match="no row has privileged_context"):
        corrupt(rows([None, None]), PrivilegedNoise(kind="dropped"))
    with pytest.raises(DataError, match="one row alone"):
        corrupt(rows(["plan A"]), PrivilegedNoise(kind="wrong"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"share": 0.5}, "kind is missing"),
        ({"kind": "wrong", "part": 0.5}, "unknown key part"),
        ({"kind": "evil"}, "evil"),
        ({"kind": "wrong", "share": 0}, "above 0"),
        ({"kind": "wrong", "share": True}, "above 0"),
        ({"kind": "noisy", "strength": 2.0}, "strength"),
        ({"kind": "wrong", "seed": 0.5}, "whole number"),
    ],
)
def test_bad_noise_is_refused_when_settings_are_read(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_settings(None, model_name_or_path="s", task="dag", output_dir="runs/x", privileged_noise=given)


def test_training_rows_are_corrupted_and_held_out_rows_are_not() -> None:
    options = {"model_name_or_path": "s", "task": "dag", "output_dir": "runs/x", "train_prompts": 8, "eval_prompts": 8}
    clean_train, clean_test, _ = load_rows(load_settings(None, **options))
    train, test, _ = load_rows(load_settings(None, **options, privileged_noise={"kind": "wrong"}))
    assert test is not None and clean_test is not None
    assert list(test["privileged_context"]) == list(clean_test["privileged_context"])
    assert all(a != b for a, b in zip(train["privileged_context"], clean_train["privileged_context"], strict=True))
