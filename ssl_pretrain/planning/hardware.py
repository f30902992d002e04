"""Rates of GPUs and their links, from data sheets."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ssl_pretrain.config import PlanConfig
from ssl_pretrain.planning.trace import CONVOLUTION, Trace

GIGA, TERA = 1e9, 1e12
MATMUL_SHARE = 0.8  # large bfloat16 products reach 790 of 989 TFLOP/s on an H100
BANDWIDTH_SHARE = 0.85  # a copy reaches this share of the memory bandwidth
LINK_SHARE = 0.8  # NCCL's large all-reduces reach this share of the link


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and its links. Bandwidths are bytes per second in one direction."""

    name: str
    memory_bytes: float
    matmul_rate: float  # FLOP/s of dense bfloat16 products with float32 sums
    float32_matmul_rate: float  # FLOP/s of float32 products without tensor cores
    convolution_rate: float  # FLOP/s of convolutions
    memory_bandwidth: float
    intra_node_bandwidth: float  # from one GPU to the others of its node
    inter_node_bandwidth: float  # from one node to the others
    roofline_share: float = 1.0  # measured share that training steps reach, 1 if unknown
    color_share: float = 1.0  # measured share of the bandwidth that color reaches, 1 if unknown
    launch_seconds: float = 7e-6  # time that the host takes per eager operation
    latency_seconds: float = 7e-6  # time that a collective takes per level of a tree of ranks
    decoded_per_core: float = 0.0  # images that a core decodes per second, 0 to ignore the loader

    def trace_seconds(self, trace: Trace) -> float:
        """Return the time of a computation, or the time of its launches if that is longer."""
        launch_seconds = int((trace.bytes_moved > 0).sum()) * self.launch_seconds
        return max(sum(self.bound_seconds(trace)) / self.roofline_share, launch_seconds)

    def bound_seconds(self, trace: Trace) -> tuple[float, float]:
        """Return the seconds of compute-bound operations and those of memory-bound operations.

        At full rates an operation takes the longer of its arithmetic time and its memory time.
        """
        rate = np.full(len(trace.flops), self.matmul_rate)
        rate[trace.without_tensor_cores] = self.float32_matmul_rate
        rate[trace.kinds == CONVOLUTION] = self.convolution_rate
        arithmetic, memory = trace.flops / rate, trace.bytes_moved / self.memory_bandwidth
        compute_bound = arithmetic > memory
        return float(arithmetic[compute_bound].sum()), float(memory[~compute_bound].sum())


@dataclass(frozen=True)
class DataSheet:
    """Published rates of a GPU. Training can only be planned for GPUs with a memory size."""

    bf16: float  # dense TFLOP/s in bfloat16, or in float16 for GPUs without bfloat16
    memory: float = 0  # GB
    fp32: float = 0  # TFLOP/s without tensor cores
    bandwidth: float = 0  # memory bandwidth, TB/s
    link: float = 0  # GB/s in one direction, all links of a GPU within its node
    node: float = 0  # GB/s in one direction, all network ports of a node


# NVIDIA's data sheets, keyed by a part of the name that CUDA reports. The first match counts.
# Nodes: DGX H100 and H200 have 8 ports of 400 Gbit/s, and DGX A100 has 8 ports of 200 Gbit/s. Two
# ports of 200 Gbit/s are assumed for a node with L40S.
DATA_SHEETS = {
    "B200": DataSheet(2250.0),
    "H200": DataSheet(989.4, memory=141, fp32=67, bandwidth=4.8, link=450, node=400),
    "H100 PCIe": DataSheet(756.0),
    "H100 NVL": DataSheet(835.0),
    "H100": DataSheet(989.4, memory=80, fp32=67, bandwidth=3.35, link=450, node=400),
    "A100": DataSheet(312.0, memory=80, fp32=19.5, bandwidth=2.039, link=300, node=200),
    "A40": DataSheet(149.7),
    "L40S": DataSheet(362.05, memory=48, fp32=91.6, bandwidth=0.864, link=32, node=50),
    "L40": DataSheet(181.0),
    "L4": DataSheet(121.0),
    "A10": DataSheet(125.0),
    "V100": DataSheet(125.0),
    "T4": DataSheet(65.0),
    "RTX 4090": DataSheet(165.2),
    "RTX 3090": DataSheet(71.0),
}


def peak_tflops(device: torch.device) -> float:
    """Return the peak bfloat16 TFLOP/s of a device, or 0 if it is unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((sheet.bf16 for model, sheet in DATA_SHEETS.items() if model in name), 0.0)


def from_data_sheet(name: str, sheet: DataSheet) -> Machine:
    """Return the rates that single large kernels reach on a GPU."""
    matmul_rate = sheet.bf16 * TERA * MATMUL_SHARE
    return Machine(
        name,
        memory_bytes=sheet.memory * GIGA,
        matmul_rate=matmul_rate,
        float32_matmul_rate=sheet.fp32 * TERA * MATMUL_SHARE,
        convolution_rate=matmul_rate,
        memory_bandwidth=sheet.bandwidth * TERA * BANDWIDTH_SHARE,
        intra_node_bandwidth=sheet.link * GIGA * LINK_SHARE,
        inter_node_bandwidth=sheet.node * GIGA * LINK_SHARE,
    )


MACHINES = {
    name: from_data_sheet(name, sheet) for name, sheet in DATA_SHEETS.items() if sheet.memory
}


def configured_machine(config: PlanConfig) -> Machine:
    """Return the machine that `plan.gpu` names, with the rates that the configuration sets."""
    rates: dict[str, Any] = {
        "intra_node_bandwidth": config.intra_node_gb_per_second * GIGA,
        "inter_node_bandwidth": config.inter_node_gb_per_second * GIGA,
        "decoded_per_core": config.decoded_per_core,
    }
    return replace(MACHINES[config.gpu], **{name: rate for name, rate in rates.items() if rate})
