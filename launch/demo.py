"""`make demo`: pretrains on real digits here, evaluates, and prints what was learnt. No download, no account."""

from __future__ import annotations

import sys
import time
from pathlib import Path

if not __package__:  # run as a file from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssl_pretrain.launch import local

CONFIG = "configs/simclr_digits.yaml"
RUN = "runs/demo"


def main() -> int:
    with local.launching():
        return _main()


def _main() -> int:
    print(
        f"Pretraining with {CONFIG} into {RUN}: SimCLR on 1,297 real 8 x 8 digits, without their labels. A few minutes.",
        flush=True,
    )
    start = time.monotonic()
    status = local.run([sys.executable, "-m", "ssl_pretrain.train", CONFIG, f"output={RUN}"])
    if status:
        return status
    seconds = time.monotonic() - start
    return local.run(
        [sys.executable, "-m", "ssl_pretrain.eval.demo_summary", RUN, f"training={seconds:.0f}"]
    )


if __name__ == "__main__":
    sys.exit(main())
