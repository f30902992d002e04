"""The settings of a run. Most sections are declared in the module that uses them."""

from dataclasses import dataclass
from typing import Literal

from ssl_pretrain.checkpoint.checkpoints import CheckpointConfig
from ssl_pretrain.config import channels
from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.fault_tolerance.nan_guard import GuardConfig
from ssl_pretrain.methods.base import MethodConfig
from ssl_pretrain.models.text_encoders import TextEncoderConfig
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.monitoring.collapse import HealthConfig
from ssl_pretrain.monitoring.log_config import LogConfig
from ssl_pretrain.monitoring.online_knn import OnlineConfig
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel.execution import ParallelConfig
from ssl_pretrain.schema import DIMENSIONLESS, image_sizes, setting
from ssl_pretrain.views.recipe import ViewsConfig
from ssl_pretrain.views.text_recipe import TextConfig


@dataclass
class PlanConfig:
    """Machine for which `--plan` estimates memory and time."""

    gpu: Literal["", "H100", "H200", "A100", "L40S"] = setting(
        "",
        "Type of GPU. The number of GPUs is launch.nodes x launch.gpus_per_node. "
        "Empty means no estimate of memory and time.",
    )
    intra_node_gb_per_second: float = setting(
        0.0,
        "Bandwidth, one way, from one GPU to the others on its node. "
        "0 takes it from the GPU's data sheet.",
        unit="GB/s",
    )
    inter_node_gb_per_second: float = setting(
        0.0,
        "Bandwidth, one way, from one node to the others, all ports together. "
        "0 takes it from the GPU's data sheet.",
        unit="GB/s",
    )
    decoded_per_core: float = setting(
        0.0,
        "Rate at which one CPU core decodes and crops. 0 leaves data loading out of the estimate.",
        unit="images/s",
    )
    disk_gb_per_second: float = setting(
        1.0,
        "Rate at which all ranks together write a checkpoint. The default is an assumption.",
        unit="GB/s",
        above=0,
        maximum=1e6,
    )
    num_images: int = setting(
        0,
        "Training images in the data set. 0 counts them, which needs access to the data.",
        unit="images",
    )


@dataclass
class LaunchConfig:
    """Machines and processes of a run, for `ssl-pretrain pretrain`."""

    cluster: Literal["auto", "slurm", "local"] = setting(
        "auto",
        "Where the run starts. auto means SLURM if jobs can be submitted, else this machine.",
    )
    ranks: int = setting(
        0, "Processes per machine. 0 means one per GPU, or one on CPU.", unit="processes"
    )
    max_restarts: int = setting(
        3,
        "How many times torchrun restarts all ranks from the newest checkpoint after losing one. "
        "SLURM requeues the job instead.",
        unit="restarts",
    )
    hosts: str = setting(
        "", "Host names, such as a,b. One torchrun command per host is printed, and none is run."
    )
    port: int = setting(
        29500, "Port on the first host through which the ranks connect.", unit=DIMENSIONLESS
    )
    nodes: int = setting(1, "SLURM: number of nodes.", unit="nodes")
    gpus_per_node: int = setting(
        0, "SLURM: GPUs per node. 0 means CPU nodes with `ranks` processes each.", unit="GPUs"
    )
    cpus_per_rank: int = setting(
        0, "SLURM: CPU cores per rank. 0 means data.num_workers.", unit="CPU cores"
    )
    memory_gb: int = setting(0, "SLURM: memory per node. 0 means the cluster's default.", unit="GB")
    hours: float = setting(
        24.0,
        "SLURM: time limit of one job. A run that takes longer continues when the job is requeued, "
        "or in the next job of the chain.",
        unit="hours",
    )
    signal_seconds: int = setting(
        120,
        "SLURM: how long before the time limit the job is signaled. "
        "One step and one checkpoint must fit into this time.",
    )
    requeue: bool = setting(
        True, "SLURM: requeue the job after preemption, the time limit or the loss of a node."
    )
    chain: int = setting(
        1,
        "SLURM: number of jobs that run one after the other, for clusters that do not requeue.",
        unit="jobs",
    )
    partition: str = setting("", "SLURM: partition. Empty means the cluster's default.")
    account: str = setting("", "SLURM: account. Empty means the user's default.")
    qos: str = setting("", "SLURM: quality of service. Empty means the cluster's default.")
    constraint: str = setting("", "SLURM: required features of the nodes. Empty means none.")


@dataclass
class EvaluationConfig:
    """Evaluations after a run, and the settings they share."""

    at_end: list[str] = setting(
        ["knn", "linear", "report"],
        "Evaluation commands that `ssl-pretrain pretrain` runs after training.",
    )
    image_size: int | list[int] = setting(
        0,
        "Height and width of the images: one number for a square, or [height, width]. "
        "0 means the size of the first crop.",
        unit="pixels",
    )
    crop_ratio: float = setting(
        0.875,
        "Side of the center crop divided by the side of the resized image. A rectangular image is "
        "resized until it covers height / crop_ratio and width / crop_ratio.",
        above=0,
        maximum=1,
    )
    interpolation: Literal["bilinear", "bicubic"] = setting(
        "bilinear", "Interpolation of the resize."
    )
    k: int = setting(20, "Number of nearest neighbors that vote.", unit="neighbors")
    temperature: float = setting(0.07, "Divisor of the neighbors' cosine similarities.")
    sts_folder: str = setting(
        "",
        "Folder with the tasks of `sts`, in SentEval's layout, as its data/downstream.",
    )

    def __post_init__(self) -> None:
        self.image_size = image_sizes.simplify(self.image_size)


@dataclass
class RunConfig:
    """All settings of one pretraining run."""

    method: MethodConfig = setting(MethodConfig(), "The self-supervised method and its loss.")
    backbone: BackboneConfig = setting(
        BackboneConfig(), "The network that is pretrained and its initial weights."
    )
    data: DataConfig = setting(DataConfig(), "The images and how they are read.")
    views: ViewsConfig = setting(ViewsConfig(), "Crops and augmentations.")
    text: TextConfig = setting(TextConfig(), "Captions and sentences, for methods that take texts.")
    text_encoder: TextEncoderConfig = setting(
        TextEncoderConfig(), "The network that encodes texts, for methods that take them."
    )
    optim: OptimConfig = setting(OptimConfig(), "The optimizer and its schedule.")
    parallel: ParallelConfig = setting(ParallelConfig(), "How the ranks share the computation.")
    checkpoint: CheckpointConfig = setting(
        CheckpointConfig(), "When to save checkpoints, and which ones to keep.", on_resume="free"
    )
    log: LogConfig = setting(
        LogConfig(), "Metrics, and the trackers that show them.", on_resume="free"
    )
    online: OnlineConfig = setting(
        OnlineConfig(), "Accuracies measured during the run.", on_resume="free"
    )
    health: HealthConfig = setting(HealthConfig(), "Detection of collapse.", on_resume="free")
    guard: GuardConfig = setting(
        GuardConfig(), "Recovery from gradients that are not finite.", on_resume="free"
    )
    launch: LaunchConfig = setting(
        LaunchConfig(), "Machines and processes, for `ssl-pretrain pretrain`.", on_resume="free"
    )
    evaluation: EvaluationConfig = setting(
        EvaluationConfig(), "Evaluations after the run.", on_resume="free"
    )
    plan: PlanConfig = setting(
        PlanConfig(), "Machine for which `--plan` estimates memory and time.", on_resume="free"
    )
    seed: int = setting(
        0,
        "Seed of every random number of the run.",
        minimum=0,
        maximum=2**63 - 1,
        unit=DIMENSIONLESS,
    )
    epochs: int = setting(100, "Passes over the training images.", on_resume="warn", minimum=1)
    global_batch_size: int = setting(
        4096,
        "Images per optimizer step, over all ranks and micro-batches.",
        minimum=1,
        unit="images",
    )
    micro_batch_size: int | str = setting(
        0,
        "Images per forward pass on one rank. 0 means the rank's whole share of the global batch. "
        "auto means the largest micro-batch that fits in memory, found by trial.",
        on_resume="free",
        unit="images",
    )
    output: str = setting(
        "", "Folder of the run. Empty means runs/<name of the YAML>.", on_resume="free"
    )

    def __post_init__(self) -> None:
        channels.fit(self)
