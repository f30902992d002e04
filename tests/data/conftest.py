"""Fixtures for the tests of data sets."""

import pytest

from ssl_pretrain.data.sources import DataConfig, open_source


@pytest.fixture
def open_split(tmp_path):
    """Return a function that opens a split of a data set, with a cache of the test's own."""

    def open_split(root, split="train", **options):
        options = {"cache_dir": str(tmp_path / "cache")} | options
        return open_source(DataConfig(root=str(root), **options), split)

    return open_split
