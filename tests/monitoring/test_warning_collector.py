"""Warnings of all ranks, each shown once."""

import warnings

from conftest import run_ranks

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.monitoring.console import WarningCollector


def _warn_on_ranks():
    messages = []
    collector = WarningCollector(messages.append if process_group.is_main() else None)
    collector.install()
    try:
        for _ in range(3):
            warnings.warn("on every rank", stacklevel=1)
            if process_group.rank() == 2:
                warnings.warn("on one rank", stacklevel=1)
        num_pending = len(collector.pending)
        collector.show_from_ranks(collectives.gather_objects(collector.take_pending()))
    finally:
        collector.uninstall()
    return num_pending, [text.partition(" (")[0] + text.partition(")")[2] for text in messages]


def test_each_warning_is_shown_once_with_the_other_ranks_that_raised_it():
    by_rank = run_ranks(_warn_on_ranks, world_size=3)
    assert by_rank == [(0, ["on every rank", "on one rank on rank 2"]), (1, []), (2, [])]
