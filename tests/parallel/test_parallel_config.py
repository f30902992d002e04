"""Settings of parallel execution that exclude each other."""

import pytest

from ssl_pretrain.parallel import parallel_config
from ssl_pretrain.parallel.parallel_config import ParallelConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"compile": True, "activation_checkpointing": "selective"},
            "parallel.activation_checkpointing: selective cannot be combined with "
            "parallel.compile, because the compiler chooses what to recompute; choose none or "
            "blocks",
        ),
        (
            {"cuda_graphs": True},
            "parallel.cuda_graphs: true needs parallel.compile; set parallel.cuda_graphs=false",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        parallel_config.check(ParallelConfig(**settings))
    assert str(error.value) == message
