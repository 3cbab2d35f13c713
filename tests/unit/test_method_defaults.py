"""The published settings of every method: what a table is made with where nothing is chosen."""

import inspect
from typing import Any

import pytest

import dopd
from dopd.methods import METHODS

# As the papers (or the reports on them) give them; `docs/reference/methods.md` names the sources.
PUBLISHED: dict[str, dict[str, Any]] = {
    "dopd": {"top_k": 128, "strong_weight": 1.0, "light_weight": 0.6, "weak_weight": 0.3, "trim": 0.05},
    "gkd": {"divergence": "js", "beta": 0.5, "lmbda": 1.0, "seed": 0},
    "proxy_kd": {"alpha": 1.0, "mean": None, "deviation": None},
    "bridge_garden_off_policy": {"weighting": "confidence"},
    "exopd": {"extrapolation": 1.25},
    "veto": {"divergence": "forward_kl", "beta": 0.8},
    "fast_opd": {"start": 1, "growth": 256},
    "stopgrad_topk": {"top_k": 20},
    "eopd": {"threshold": 0.8, "top_k": 16},
    "tip": {"fraction": 0.5},
    "ta_opd": {"fraction": 0.05},
    "reopold": {"mixture": 0.2, "fraction": 0.5},
    "tsd_kd": {"beta": 0.9, "top_k": 10, "opening": 0.1, "highest": 0.1},
    "cal_opd": {"tolerance": 5.0, "skip": True},
    "bridge_garden": {"weighting": "confidence"},
    "opsa": {"fraction": 0.2},
    "opsd_contrast": {"strength": 0.5, "wrong_floor": -5.0, "clamp": 0.05, "top_k": 100, "hints": "sibling"},
    "ar_opd": {"residual": 1.0, "bound": 5.0},
    "purified_opsd": {"beta": 1.0, "bound": 5.0},
    "ad_opsd": {"fraction": 0.2, "tau": 1.0},
    "diffgate": {"weight": 1.0, "cap": 10.0},
    "rg_opd": {"margin": 0.0},
    "uni_opd": {"delta": 0.1},
    "rlsd": {"epsilon": 0.2, "mix": 0.5, "decay_steps": 50},
    "rlcsd": {
        "tau": 0.02,
        "mix": 0.5,
        "snapshot_steps": 10,
        "drop": True,
        "apart": True,
        "siblings": "random",
        "num_contrast": 4,
        "ended": True,
        "hints": "sibling",
    },
    "sipo": {"mix": 0.5, "bound": 0.2},
    "distilled_rl": {"bound": 3.0},
    "conspo": {"temperature": 10.0, "margin": 0.01, "warmup": 0.3},
    "dial_opd": {"fraction": 0.4, "power": 0.5},
    "beta_opsd": {"beta": 0.5, "divergence": "reverse_kl"},
    "sdpg": {"beta": 0.001, "alpha": 0.001},
    "opcd": {"top_k": 256, "tail": "truncate"},
    "opsd": {"divergence": "js", "clamp": None, "support": "full", "anchor": "frozen"},
    "sdft": {"divergence": "forward_kl", "anchor": "ema", "ema_decay": 0.99},
    "sdpo": {"top_k": 100, "ema_decay": 0.95},
    "vision_opd": {"top_k": 100, "ema_decay": 0.95},
    "dapd_entangled": {"clamp": 0.05, "snapshot_steps": 100},
    "dapd": {"clamp": 0.05, "snapshot_steps": 100},
    "feedback": {"divergence": "reverse_kl", "ema_decay": 0.95},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_method_has_its_published_settings(name: str) -> None:
    defaults = {one.name: one.default for one in inspect.signature(METHODS[name]).parameters.values()}
    assert {key: defaults[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert dopd.table(name) == dopd.table(name, **PUBLISHED[name])


def test_every_method_with_a_number_of_its_own_is_listed() -> None:
    shared = {"divergence", "support", "top_k", "tail", "anchor", "merge_ends"}  # of the naive methods and ablations
    for name in METHODS:
        own = {one.name for one in inspect.signature(METHODS[name]).parameters.values()} - shared
        assert name in PUBLISHED or name.startswith(("dopd_", "vanilla")) or not own, name


def test_without_routing_every_token_has_half_of_each_target() -> None:
    teacher, student = dopd.table("dopd_unrouted").rules
    assert (teacher.weight, student.weight) == pytest.approx((0.5, 0.5 * 0.6))
