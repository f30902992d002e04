"""Pack what tests/gpu/run.py needs on a GPU machine without network access: `make gpu-kit`.

The files go into .gpu-kit, which git ignores: wheels of pure-Python packages that such a machine
usually lacks, and the JPEGs of CIFAR-10's zip in an archive of a third of its size. The commands to
run on that machine are printed.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / ".gpu-kit"
# Wheels that a GPU machine usually lacks. lightly's step is timed next to ours.
WHEELS = ("omegaconf==2.4.0", "lightly==1.6.0", "lightly-utils==0.0.2")
FIRST_STAGES = (
    "sanitizer tests simclr_resnet50 barlow_twins_vit_small "
    '"moco_v3_vit_small, compiled" "moco_v3_vit_base, compiled"'
)
PREPARE_AND_RUN = (
    ". tests/gpu/prepare.sh && python3 tests/gpu/run.py --data .gpu-kit/cifar10 --copy OUT"
)
INSTRUCTIONS = f"""
Copy the repository and the folder .gpu-kit ({{size:.0f}} MiB) to the machine. It needs Python 3.12
with torch, torchvision, triton, timm, numba, numpy, scikit-learn, safetensors and pytest. Run the
commands from the root of the repository. Each takes at most ten minutes. The results are written to
runs/gpu and, after every stage, copied to the folder given by --copy.

    {PREPARE_AND_RUN} --minutes 8 --only {FIRST_STAGES}
    {PREPARE_AND_RUN} --minutes 9.5 --only cifar10
    {PREPARE_AND_RUN} --minutes 8

CIFAR-10 trains for 200 epochs, so run its command twice. If the second run gets a fresh machine,
copy runs/gpu to it, so that the training resumes from its checkpoint.
"""


def download_wheels() -> None:
    """Download wheels for Python 3.12 on Linux, whatever the local Python and system."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    target = ["--python-version", "3.12", "--implementation", "cp"]
    target += ["--platform", "manylinux2014_x86_64"]
    command = [*pip, *target, "--dest", str(KIT / "wheels"), *WHEELS]
    subprocess.run(command, check=True)


def pack_cifar10(archive: Path) -> None:
    """Write the JPEGs of the zip to cifar10.tar.xz, which stores their common headers only once."""
    with (
        zipfile.ZipFile(archive) as source,
        tarfile.open(KIT / "cifar10.tar.xz", "w:xz", preset=3) as target,
    ):
        images = (name for name in source.namelist() if not name.endswith("/"))
        for name in sorted(name for name in images if name.startswith(("train/", "test/"))):
            content = source.read(name)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            target.addfile(entry, io.BytesIO(content))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data_folder = Path(os.environ.get("SSL_PRETRAIN_DATA", ROOT.parent / "shared" / "data"))
    archive = data_folder / "cifar10.zip"
    parser.add_argument("--data", type=Path, default=archive, help="CIFAR-10 as a zip")
    options = parser.parse_args()
    if not options.data.exists():
        print(
            f"error: --data: {options.data} does not exist; give the zip of CIFAR-10, with "
            "train/CLASS and test/CLASS",
            file=sys.stderr,
        )
        return 2
    KIT.mkdir(exist_ok=True)
    download_wheels()
    if not (KIT / "cifar10.tar.xz").exists():
        pack_cifar10(options.data)
    files = (KIT / "cifar10.tar.xz", *KIT.glob("wheels/*"))
    print(INSTRUCTIONS.format(size=sum(path.stat().st_size for path in files) / 2**20))
    return 0


if __name__ == "__main__":
    sys.exit(main())
