"""The examples in the docstrings of the losses run and print what they show."""

import doctest

import pytest
import torch

from ssl_pretrain import losses

NAMES = {"torch": torch, **{name: getattr(losses, name) for name in losses.__all__}}
FINDER = doctest.DocTestFinder(exclude_empty=False, recurse=False)


@pytest.mark.parametrize("name", losses.__all__)
def test_the_example_prints_what_it_shows(name):
    (example,) = FINDER.find(getattr(losses, name), name, globs=dict(NAMES))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    results = runner.run(example)
    assert results.attempted > 0, "the docstring has no example"
    assert results.failed == 0
