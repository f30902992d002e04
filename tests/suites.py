"""Parameters of tests, of which only some run in the default suite."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def quick_and_full(quick: Sequence[Any], full: Iterable[Any]) -> list[Any]:
    """Return the parameters, of which those not in `quick` are in the full suite only.

    A tuple is a parameter for each of several names.

    Raises:
        ValueError: If a quick one does not exist.
    """
    parameters = list(full)
    if missing := [parameter for parameter in quick if parameter not in parameters]:
        raise ValueError(f"no such parameters: {missing}")
    return [
        pytest.param(
            *(parameter if isinstance(parameter, tuple) else (parameter,)),
            marks=() if parameter in quick else pytest.mark.full,
        )
        for parameter in parameters
    ]
