"""Shares of the roofline that training steps reached on GPUs, by kind of network.

A share is the time of a computation at the rates of `hardware.MACHINES`, divided by the measured
time. `tests/gpu/run.py` measures it and prints the entries of a new run, to be copied into
`MEASURED_SHARES`. This table is the only place that holds them.
"""

from dataclasses import dataclass

COLOR = "color and copy"  # color augmentation, and the copy of the crops to the GPU


@dataclass(frozen=True)
class MeasuredShare:
    """Share of the roofline that one kind of work reaches on one GPU.

    Attributes:
        gpu: Name in `hardware.MACHINES`.
        network: Class of the backbone in timm, such as ResNet or VisionTransformer, or `COLOR`.
        compiled: True if the blocks were compiled. The roofline is that of the eager step, so a
            compiled step can exceed 1.
        share: Time at full rates over measured time.
        source: Step, revision and page of the measurement.
    """

    gpu: str
    network: str
    compiled: bool
    share: float
    source: str


_PAGE = "revision b09de66, docs/results/gpu.md"
MEASURED_SHARES = (
    MeasuredShare("H200", "ResNet", False, 0.65, f"simclr_resnet50, {_PAGE}"),
    MeasuredShare("H200", "VisionTransformer", True, 0.73, f"moco_v3_vit_small, compiled, {_PAGE}"),
    MeasuredShare("H200", COLOR, False, 0.08, f"simclr_resnet50, {_PAGE}"),
)


def find_share(gpu: str, network: str, compiled: bool) -> MeasuredShare | None:
    """Return the measurement of a kind of work on a GPU, or None if there is none."""
    key = (gpu, network, compiled)
    return next(
        (entry for entry in MEASURED_SHARES if (entry.gpu, entry.network, entry.compiled) == key),
        None,
    )


def describe_share(gpu: str, network: str, compiled: bool) -> str:
    """Return the plan's line about the share of the roofline that its times assume."""
    kind = network if network == COLOR else f"{network}, {'compiled' if compiled else 'eager'}"
    entry = find_share(gpu, network, compiled)
    if entry is not None:
        return (
            f"share of the roofline: {entry.share:.0%}, measured on {gpu} for {kind} "
            f"({entry.source})"
        )
    meaning = "the times are lower bounds"
    if compiled:
        meaning = "the times are the roofline of the step without compilation"
    return f"share of the roofline: not measured on {gpu} for {kind}; {meaning}"
