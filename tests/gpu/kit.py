"""Pack what tests/gpu/run.py needs on a GPU machine without a network into .gpu-kit, and print the calls: `make gpu-kit`.

The folder is ignored by git. It holds wheels of the pure-Python packages that such a machine usually lacks, and the JPEGs of
CIFAR-10's zip in an archive of a third of its size.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / ".gpu-kit"
WHEELS = (
    "omegaconf==2.4.0",
    "lightly==1.6.0",
    "lightly-utils==0.0.2",
)  # lightly's step is measured beside ours
FIRST = 'sanitizer tests simclr_resnet50 barlow_twins_vit_small "moco_v3_vit_small, compiled" "moco_v3_vit_base, compiled"'
CALLS = f"""
Carry the repository and the folder .gpu-kit ({{size:.0f}} MiB) to the machine. It needs Python 3.12 with torch, torchvision, triton,
timm, numba, numpy, scikit-learn, safetensors and pytest. Each line is one call of at most ten minutes, from the repository's root.
Results are in runs/gpu and in the folder that --copy names, which is written after every stage.

    . tests/gpu/prepare.sh && python3 tests/gpu/run.py --data .gpu-kit/cifar10 --minutes 8 --copy OUT --only {FIRST}
    . tests/gpu/prepare.sh && python3 tests/gpu/run.py --data .gpu-kit/cifar10 --minutes 9.5 --copy OUT --only cifar10
    . tests/gpu/prepare.sh && python3 tests/gpu/run.py --data .gpu-kit/cifar10 --minutes 8 --copy OUT

CIFAR-10 trains for 200 epochs and takes two calls. If a call gets a fresh machine, bring runs/gpu along, so that the training
goes on from its checkpoint.
"""


def download_wheels() -> None:
    """Download the wheels for Python 3.12 on Linux, whatever Python and system run this script."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.12",
        "--implementation", "cp", "--platform", "manylinux2014_x86_64", "--dest", str(KIT / "wheels"), *WHEELS,
    ]  # fmt: skip
    subprocess.run(command, check=True)


def pack_cifar10(archive: Path) -> None:
    """Write the JPEGs of the zip to cifar10.tar.xz. xz, unlike a zip, stores the headers that they share only once."""
    with (
        zipfile.ZipFile(archive) as source,
        tarfile.open(KIT / "cifar10.tar.xz", "w:xz", preset=3) as target,
    ):
        names = [
            name
            for name in source.namelist()
            if name.startswith(("train/", "test/")) and not name.endswith("/")
        ]
        for name in sorted(names):
            content = source.read(name)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            target.addfile(entry, io.BytesIO(content))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "data" / "cifar10.zip",
        help="CIFAR-10 as a zip",
    )
    options = parser.parse_args()
    if not options.data.exists():
        print(
            f"error: --data: there is no {options.data}; name the zip of CIFAR-10, with train/CLASS and test/CLASS",
            file=sys.stderr,
        )
        return 2
    KIT.mkdir(exist_ok=True)
    download_wheels()
    if not (KIT / "cifar10.tar.xz").exists():
        pack_cifar10(options.data)
    size = (
        sum(path.stat().st_size for path in (KIT / "cifar10.tar.xz", *KIT.glob("wheels/*"))) / 2**20
    )
    print(CALLS.format(size=size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
