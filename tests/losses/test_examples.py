"""The examples in the docstrings of the losses run and print what they show."""

import doctest

import pytest

from ssl_pretrain.losses import contrastive

FINDER = doctest.DocTestFinder(exclude_empty=True)
EXAMPLES = [example for example in FINDER.find(contrastive) if example.examples]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name.rpartition(".")[2])
def test_the_example_prints_what_it_shows(example):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    results = runner.run(example)
    assert results.attempted > 0
    assert results.failed == 0
