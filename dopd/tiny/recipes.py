"""The named tiny models of each embedded task, as data."""

from __future__ import annotations

from collections.abc import Mapping

from dopd.tiny.pretrain import Recipe

RECIPES: Mapping[str, Mapping[str, Recipe]] = {}
