"""Weights that cannot be fetched (no network, no package index) are a skip that says so, unless they are demanded."""

import os
from collections.abc import Callable

import pytest
from fetch_weights import WeightsError, weights_folder


@pytest.fixture(scope="session")
def weights() -> Callable[[str], str]:
    """Folder of a real model by name; the first call of a machine downloads it."""

    def folder(name: str) -> str:
        try:
            return str(weights_folder(name))
        except WeightsError as error:
            if os.environ.get("DOPD_REQUIRE_WEIGHTS"):
                raise
            pytest.skip(str(error))

    return folder
