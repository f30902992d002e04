"""k-NN beside scikit-learn's brute force, and what a grid of learning rates costs: `python tests/bench/evaluation.py`.

knn_vs_sklearn: seconds of scikit-learn's fastest brute force over ours, the faster backend; more is better. grid12_over_one:
seconds of a training step with 12 learning rates over those with one, backbone included; less is better. The cached step,
where features are kept and nothing else is computed, is in the table: there the classifiers are all of the work.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from measure import interleaved, mib, versions
from torch.nn import functional as F

from ssl_pretrain.eval import knn, protocols
from ssl_pretrain.eval.frozen import published_linear
from ssl_pretrain.eval.frozen.features import Feature
from ssl_pretrain.eval.frozen.linear_heads import Classifiers
from ssl_pretrain.models import backbones
from ssl_pretrain.models.backbones import BackboneConfig
from ssl_pretrain.parallel import memory

CPU = torch.device("cpu")
CLASSES = 1000
CANDIDATES = ["ours, torch", "scikit-learn, euclidean", "ours, faiss", "scikit-learn, cosine"]


def clusters(n: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that are not all alike: a class's centre and as much noise, (n, dim), and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    centres = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(0))
    return torch.randn(n, dim, generator=generator).add_(centres[labels]), labels


def neighbours(
    num_bank: int, num_queries: int, dim: int, k: int, repeats: int, chosen: list[str]
) -> float:
    from sklearn.neighbors import NearestNeighbors

    (bank, labels), (queries, _) = clusters(num_bank, dim, 1), clusters(num_queries, dim, 2)

    def ours(backend: str) -> None:
        knn.Search(bank, labels, CLASSES, backend).predict(queries, [(k, 0.07)])

    def theirs(metric: str) -> None:
        exact = NearestNeighbors(n_neighbors=k, algorithm="brute", metric=metric).fit(
            F.normalize(bank, dim=1).numpy()
        )
        exact.kneighbors(F.normalize(queries, dim=1).numpy())

    candidates = {
        "ours, torch": lambda: ours("torch"),
        "scikit-learn, euclidean": lambda: theirs("euclidean"),
        "ours, faiss": lambda: ours("faiss"),
        "scikit-learn, cosine": lambda: theirs("cosine"),
    }
    print(
        f"k-NN, {num_bank:,} x {dim:,} features, {num_queries:,} queries, k {k}; the bank itself is {mib(bank.nbytes)}"
    )
    taken: dict[str, list[float]] = {}
    for _ in range(repeats):  # in turn, so that a slow minute of the machine hits all alike
        for name in chosen:
            began = time.perf_counter()
            held = memory.peak(candidates[name], CPU)
            taken.setdefault(name, []).append(time.perf_counter() - began)
            print(f"  {name:24} {taken[name][-1]:8.2f} s  {mib(held)} more", flush=True)
    fastest = {
        who: min(statistics.median(each) for name, each in taken.items() if name.startswith(who))
        for who in ("ours", "scikit")
    }
    return fastest["scikit"] / fastest["ours"]


def grid(name: str, image_size: int, batch: int, repeats: int) -> float:
    backbone = (
        backbones.build(BackboneConfig(name), image_size)
        .eval()
        .to(memory_format=torch.channels_last)
    )
    images = torch.rand(batch, 3, image_size, image_size).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.randint(CLASSES, (batch,))
    protocol = protocols.LINEAR["simclr"]
    rates = [(0.001 * 2**power, 1e-6) for power in range(12)]
    judged = {
        n: published_linear._judged(
            "grid", Feature(backbone, "pooled"), rates[:n], protocol, CLASSES, CPU
        )
        for n in (1, 12)
    }
    features = torch.randn(batch, backbone.feature_dim)
    heads = {
        n: Classifiers(backbone.feature_dim, CLASSES, [0.1] * n, [1e-6] * n, like=features)
        for n in (1, 12)
    }
    with torch.no_grad():
        whole = interleaved(
            {str(n): lambda n=n: judged[n].step(images, labels, 1.0) for n in judged}, repeats, CPU
        )
        cached = interleaved(
            {str(n): lambda n=n: heads[n].step(features, labels, 1.0) for n in heads}, repeats, CPU
        )
    print(f"a step of {batch} images of {image_size} pixels, {name}, {CLASSES:,} classes")
    for what, seconds in (
        ("backbone and classifiers", whole),
        ("classifiers on kept features", cached),
    ):
        print(
            f"  {what:28} one {seconds['1']:7.3f} s, twelve {seconds['12']:7.3f} s, {seconds['12'] / seconds['1']:.2f} times"
        )
    return whole["12"] / whole["1"]


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
        help="of each kind at least one",
    )
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(versions("scikit-learn", "timm", "numpy"))
    faster = neighbours(
        options.bank, options.queries, options.dim, options.k, options.repeats, options.candidates
    )
    dearer = grid(options.backbone, options.image_size, options.batch, options.repeats)
    print(f"ratios: knn_vs_sklearn={faster:.2f} grid12_over_one={dearer:.2f}")


if __name__ == "__main__":
    main()
