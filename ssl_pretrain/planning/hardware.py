"""What a plan knows of machines: GPUs by name from their data sheets, clusters, and this machine as `calibrate` measured it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ssl_pretrain.config import PlanConfig
from ssl_pretrain.planning.trace import CONVOLUTION, Trace

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Machine:
    """One device and its links. Rates are per second, bandwidths in bytes and one way."""

    name: str
    memory: float  # bytes
    matmul: float  # bfloat16 products, float32 sums, dense; on a CPU float32
    wide_matmul: float  # float32, without tensor cores
    convolution: float
    bandwidth: float
    intra_node: float  # of one device
    inter_node: float  # of one node
    attained: float = 1.0  # share of the roofline that a training step reaches
    launch_seconds: float = 7e-6  # of the host, per operation, eager
    latency_seconds: float = 7e-6  # of a collective, per level of a tree of ranks
    decoded_per_core: float = 0.0
    on_cpu: bool = False
    source: str = "data sheets"

    def seconds(self, trace: Trace) -> float:
        """Of a computation: each operation as slow as its arithmetic or its memory, over what is attained. A CPU
        launches before it computes, a GPU meanwhile."""
        computing, launching = (
            sum(self.bounds(trace)) / self.attained,
            int((trace.moved > 0).sum()) * self.launch_seconds,
        )
        return computing + launching if self.on_cpu else max(computing, launching)

    def bounds(self, trace: Trace) -> tuple[float, float]:
        """Seconds of the operations that arithmetic bounds, and of those that memory bounds, at the full rates."""
        rate = np.full(len(trace.flops), self.matmul)
        rate[trace.wide] = self.wide_matmul
        rate[trace.kind == CONVOLUTION] = self.convolution
        arithmetic, memory = trace.flops / rate, trace.moved / self.bandwidth
        by_arithmetic = arithmetic > memory
        return float(arithmetic[by_arithmetic].sum()), float(memory[~by_arithmetic].sum())


MATMUL_SHARE = (
    0.8  # of a data sheet's peak: 790 of 989 TFLOP/s, what large bfloat16 products reach on an H100
)
BANDWIDTH_SHARE = 0.85  # of a data sheet's: what a copy reaches
LINK_SHARE = 0.8  # of a data sheet's: what NCCL's large all-reduces reach
# Share of the roofline over these rates that eager training steps reach: assumed. `python -m ssl_pretrain.planning.scaling` prints beside it what
# published speeds attain, `python -m ssl_pretrain.planning.calibrate` measures it.
ATTAINED = 0.75


def from_data_sheet(
    name: str,
    gigabytes: float,
    bf16: float,
    fp32: float,
    bandwidth: float,
    link: float,
    node: float,
) -> Machine:
    """GB of memory, dense bfloat16 and float32 TFLOP/s, TB/s of memory, GB/s one way of a GPU's links and of a node's ports."""
    matmul = bf16 * TERA * MATMUL_SHARE
    return Machine(
        name, gigabytes * GIGA, matmul, fp32 * TERA * MATMUL_SHARE, matmul, bandwidth * TERA * BANDWIDTH_SHARE,
        link * GIGA * LINK_SHARE, node * GIGA * LINK_SHARE, ATTAINED,
    )  # fmt: skip


MACHINES = {
    # NVIDIA H100 data sheet, SXM: 80 GB, 1,979 with sparsity, 67, 3.35, NVLink 900 both ways; DGX H100 data sheet: 8 ports of 400 Gbit/s
    "H100": from_data_sheet("H100", 80, 989.4, 67, 3.35, 450, 400),
    # NVIDIA H200 data sheet, SXM: 141 GB, the same rates, 4.8, NVLink 900 both ways; DGX H200 data sheet: 8 ports of 400 Gbit/s
    "H200": from_data_sheet("H200", 141, 989.4, 67, 4.8, 450, 400),
    # NVIDIA A100 80GB data sheet, SXM: 312, 19.5, 2.039, NVLink 600 both ways; DGX A100 data sheet: 8 ports of 200 Gbit/s
    "A100": from_data_sheet("A100", 80, 312, 19.5, 2.039, 300, 200),
    # NVIDIA L40S data sheet: 48 GB, 362.05, 91.6, 0.864, PCIe 4.0 x16 64 both ways; a node with 2 ports of 200 Gbit/s assumed
    "L40S": from_data_sheet("L40S", 48, 362.05, 91.6, 0.864, 32, 50),
}


def machine(config: PlanConfig) -> Machine:
    """Return the machine that `plan.gpu` names, with the links and the loader that the config gives."""
    given = {
        "intra_node": config.intra_node_gb_per_second * GIGA,
        "inter_node": config.inter_node_gb_per_second * GIGA,
        "decoded_per_core": config.decoded_per_core,
    }
    return replace(MACHINES[config.gpu], **{name: rate for name, rate in given.items() if rate})
