"""The demo that `make demo` runs: pretrain on real digits, evaluate, and print what was learned.

It needs no download and no account.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file from a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from ssl_pretrain.system import interruption

    interruption.report_in_one_line()

from ssl_pretrain.launch import local
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program

PRESET = "simclr_digits"
RUN = "runs/demo"


@local.launcher
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    ArgumentParser(
        prog=program.usage_name("python launch/demo.py"), description=__doc__
    ).parse_args(arguments)
    print(
        f"Pretraining with the preset {PRESET} into {RUN}: SimCLR on 1,297 real 8 x 8 "
        "digits, without their labels. This takes a few minutes.",
        flush=True,
    )
    start = time.monotonic()
    status = local.run([sys.executable, "-m", "ssl_pretrain.train", PRESET, f"output={RUN}"])
    if status:
        return status
    timing = f"training={time.monotonic() - start:.0f}"  # seconds
    return local.run([sys.executable, "-m", "ssl_pretrain.eval.demo_summary", RUN, timing])


if __name__ == "__main__":
    sys.exit(main())
