"""Settings of metric records and of the trackers that show them."""

from dataclasses import dataclass
from typing import Literal

from ssl_pretrain.monitoring.wandb import run as wandb_run
from ssl_pretrain.schema import DIMENSIONLESS, setting
from ssl_pretrain.system import optional_packages


@dataclass
class LogConfig:
    """Settings of metric records, Weights & Biases, TensorBoard and CSV."""

    every_steps: int = setting(10, "Steps between two records of metrics.", minimum=1)
    wandb: Literal["auto", "online", "offline", "off"] = setting(
        "auto",
        "Weights & Biases. auto: online if there is an API key and wandb is installed, else off. "
        "WANDB_MODE and WANDB_DISABLED are respected.",
    )
    project: str = setting("ssl_pretrain", "Name of the W&B project.")
    name: str = setting("", "Name of the W&B run. If empty, the name of the output folder is used.")
    tags: list[str] = setting([], "Tags of the W&B run.")
    group: str = setting(
        "",
        "Group of the W&B run. If empty, the runs of a sweep or a study have its name, and other "
        "runs have none.",
    )
    tensorboard: bool = setting(
        False,
        "Write TensorBoard files of the run and its evaluations to tensorboard/ in the output "
        "folder.",
    )
    csv: bool = setting(
        False,
        "Write the metrics to metrics.csv in the output folder, too, and the results of "
        "evaluations to evaluations.csv.",
    )
    bands: list[int] = setting(
        [],
        "Channels of the images that pictures show: three as red, green and blue, two as red and "
        "green, or one in gray, counted from 0. If empty, the first three, or gray for images of "
        "one channel.",
        minimum=0,
        unit=DIMENSIONLESS,
    )
    stall_seconds: float = setting(900.0, "Time without a record before W&B sends an alert.")
    peak_tflops: float = setting(
        0.0,
        "Peak bfloat16 throughput of one GPU, for the model FLOPs utilization. "
        "If 0, the peak is looked up by the GPU's name.",
        unit="TFLOP/s",
    )


def check(settings: LogConfig) -> None:
    """Check that the package of each chosen tracker is installed.

    Raises:
        ValueError: If one is missing.
    """
    wandb_run.check(settings.wandb)
    if settings.tensorboard:
        optional_packages.require(
            "log.tensorboard=true", "tensorboard", "tensorboard", "set log.tensorboard=false"
        )
