"""`--plan` says that the flagship recipe fits the GPUs named in its header."""

import pytest
from commands import run

CONFIG = "configs/simclr_imagenet.yaml"


@pytest.mark.full  # tracing a step of ResNet-50 takes half a minute
@pytest.mark.parametrize(
    ("gpu", "overrides", "fits"),
    [
        ("H100", [], True),
        ("H100", ["parallel.activation_checkpointing=none"], False),
        ("H200", ["parallel.activation_checkpointing=none"], True),
    ],
)
def test_the_plan_says_whether_the_flagship_fits_eight_gpus(gpu, overrides, fits):
    arguments = [
        "data.root=/data/imagenet",
        "--plan",
        f"plan.gpu={gpu}",
        "launch.gpus_per_node=8",
        *overrides,
    ]
    result = run("-m", "ssl_pretrain.train", CONFIG, *arguments, timeout=300)
    assert result.status == 0, result.text
    memory_line = next(
        line
        for line in result.stdout.splitlines()
        if line.startswith("memory per GPU with a micro-batch of 1,024 images")
    )
    assert memory_line.endswith("; fits") == fits, memory_line
