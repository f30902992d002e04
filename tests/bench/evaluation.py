"""Speed of k-NN beside scikit-learn, and the cost of a grid of learning rates.

`python tests/bench/evaluation.py` prints two ratios. knn_vs_sklearn is the time of scikit-learn's
fastest brute-force search over that of the faster of our backends; more is better. grid12_over_one
is the time of a training step with 12 learning rates over that with one, backbone included; less is
better. The table also has the step on cached features, where the linear heads are all of the work.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from measure import format_mib, time_interleaved, versions
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.eval import protocols
from ssl_pretrain.eval.frozen.knn_search import KnnClassifier
from ssl_pretrain.eval.frozen.linear_heads import LinearHeads
from ssl_pretrain.eval.frozen.named_features import Feature
from ssl_pretrain.eval.frozen.published_linear import ProbedNetwork
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.parallel import memory

CPU = torch.device("cpu")
NUM_CLASSES = 1000
CANDIDATES = ["ours, torch", "scikit-learn, euclidean", "ours, faiss", "scikit-learn, cosine"]


def draw_clusters(num_images: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (num_images, dim), class centers plus as much noise, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    centers = torch.randn(NUM_CLASSES, dim, generator=torch.Generator().manual_seed(0))
    return torch.randn(num_images, dim, generator=generator).add_(centers[labels]), labels


def compare_searches(options: argparse.Namespace) -> float:
    """Print time and memory of each candidate and return scikit-learn's time over ours."""
    bank, labels = draw_clusters(options.bank, options.dim, 1)
    queries, _ = draw_clusters(options.queries, options.dim, 2)

    def search_with_ours(backend: str) -> None:
        KnnClassifier(bank, labels, NUM_CLASSES, backend).predict(queries, [(options.k, 0.07)])

    def search_with_sklearn(metric: str) -> None:
        search = NearestNeighbors(n_neighbors=options.k, algorithm="brute", metric=metric)
        search.fit(F.normalize(bank, dim=1).numpy())
        search.kneighbors(F.normalize(queries, dim=1).numpy())

    print(
        f"k-NN, {options.bank:,} x {options.dim:,} features, {options.queries:,} queries, k"
        f" {options.k}; the bank itself is {format_mib(bank.nbytes)}"
    )
    seconds: dict[str, list[float]] = {name: [] for name in options.candidates}
    for _ in range(options.repeats):  # in turn, so that a slow minute affects all of them alike
        for name, times in seconds.items():
            owner, kind = name.split(", ")
            start = time.perf_counter()
            peak = memory.measure_peak_bytes(
                partial(search_with_ours if owner == "ours" else search_with_sklearn, kind), CPU
            )
            times.append(time.perf_counter() - start)
            print(f"  {name:24} {times[-1]:8.2f} s  {format_mib(peak)} more", flush=True)
    fastest_ours, fastest_theirs = (
        min(statistics.median(times) for name, times in seconds.items() if name.startswith(owner))
        for owner in ("ours", "scikit")
    )
    return fastest_theirs / fastest_ours


def step_from_images(network: ProbedNetwork, images: Tensor, labels: Tensor) -> None:
    """Compute the features of the images and train the heads on them."""
    network.step(network.feature(images), labels, 1.0)


def compare_grids(options: argparse.Namespace) -> float:
    """Print the time of a step with one and twelve heads and return their ratio."""
    name, size, batch = options.backbone, options.image_size, options.batch
    backbone = backbones.build(BackboneConfig(name), size).eval()
    backbone.to(memory_format=torch.channels_last)
    images = torch.rand(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(NUM_CLASSES, (batch,))
    features = torch.randn(batch, backbone.feature_dim)
    grid = [(0.001 * 2**power, 1e-6) for power in range(12)]
    full_steps, cached_steps = {}, {}
    for count in (1, 12):
        network = ProbedNetwork(
            "grid",
            Feature(backbone, "pooled"),
            grid[:count],
            protocols.LINEAR_PROTOCOLS["simclr"],
            NUM_CLASSES,
            CPU,
        )
        heads = LinearHeads(
            backbone.feature_dim, NUM_CLASSES, [0.1] * count, [1e-6] * count, like=features
        )
        full_steps[str(count)] = partial(step_from_images, network, images, labels)
        cached_steps[str(count)] = partial(heads.step, features, labels, 1.0)
    with torch.no_grad():
        full_seconds = time_interleaved(full_steps, options.repeats, CPU)
        cached_seconds = time_interleaved(cached_steps, options.repeats, CPU)
    print(f"a step of {batch} images of {size} pixels, {name}, {NUM_CLASSES:,} classes")
    for kind, seconds in (
        ("backbone and heads", full_seconds),
        ("heads on cached features", cached_seconds),
    ):
        ratio = seconds["12"] / seconds["1"]
        print(f"  {kind:28} one {seconds['1']:.3f} s, twelve {seconds['12']:.3f} s, {ratio:.2f} x")
    return full_seconds["12"] / full_seconds["1"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument(
        "--candidates",
        nargs="+",
        default=CANDIDATES,
        choices=CANDIDATES,
        help="searches to compare, at least one of ours and one of scikit-learn's",
    )
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(versions("scikit-learn", "timm", "numpy"))
    search_ratio, grid_ratio = compare_searches(options), compare_grids(options)
    print(f"ratios: knn_vs_sklearn={search_ratio:.2f} grid12_over_one={grid_ratio:.2f}")


if __name__ == "__main__":
    main()
