"""Run everything that needs a GPU: python tests/gpu/run.py

The stages, most valuable first: check the kernels with compute-sanitizer, run the tests of tests/gpu, measure training
steps (tests/gpu/steps.py), and train and evaluate SimCLR with ResNet-18 on CIFAR-10, the whole set on the device. Each
call takes at most --minutes, and the next call goes on with the stages that are missing. After every stage the results
are written to runs/gpu/results.json, and the table to runs/gpu/gpu.md or to --page. A training that was stopped goes on
from its checkpoint.

    python tests/gpu/run.py --data ../shared/data/cifar10.zip    # repeat until it says that all is done
    python tests/gpu/run.py --only cifar10 --epochs 1000         # towards the published 1,000 epochs
    python tests/gpu/run.py --again simclr_resnet50              # measure one stage anew

On a machine without the network, carry what `make gpu-kit` packs: it prints the calls. torch, torchvision, timm, numba, numpy,
safetensors and pytest have to be there. FFCV, faiss and wandb are not needed (log.wandb is off).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "runs" / "gpu" / "results.json", ROOT / "docs" / "results" / "gpu.md"
STEPS = (
    "simclr_resnet50", "barlow_twins_vit_small", "moco_v3_vit_small, compiled", "moco_v3_vit_base, compiled",
)  # fmt: skip
LATER = (
    "simclr_resnet50, compiled", "barlow_twins_vit_small, compiled", "moco_v3_vit_small", "moco_v3_vit_base",
    "swav_resnet50_multicrop", "dino_vit_small", "dino_vit_small, compiled", "vit_large_simclr", "vit_large_simclr, compiled",
    "swav_resnet50_multicrop, compiled", "dino_vit_base",
)  # fmt: skip
TARGETS = {  # views per second on an H200; of the published 871 images/s three times two views
    "simclr_resnet50": 6500, "moco_v3_vit_small": 9000, "moco_v3_vit_base": 3000, "barlow_twins_vit_small": 5226,
}  # fmt: skip
STAGES = ("sanitizer", "tests", *STEPS, "cifar10", *LATER)
COMMAND = "python tests/gpu/run.py --data ../shared/data/cifar10.zip"
LEAST = {"tests": 90.0, "cifar10": 120.0}  # seconds that have to be left for a stage to begin
MOST = {
    "sanitizer": 120.0
}  # seconds that a stage may take; a step may take 150, or 300 if it compiles
STOPPED = 75  # exit status of a training that was asked to stop and has saved
GRACE = 30.0  # seconds between SIGTERM and SIGKILL, part of what a stage may take
EVALUATIONS = 100.0  # seconds kept for k-NN and the linear evaluation after a training's last epoch


def run(command: list[str], seconds: float) -> tuple[int, str, str]:
    """Return status, output and errors of a command. It gets SIGTERM in time to end within `seconds`, and SIGKILL then."""
    grace = min(GRACE, seconds / 2)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=seconds - grace)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            out, err = process.communicate(timeout=grace)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
    return process.returncode, out, err


def sanitizer(seconds: float) -> dict[str, Any]:
    """Run the loss kernels under compute-sanitizer, which finds reads and writes out of bounds."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"error": "compute-sanitizer is not installed"}
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        "tests/losses/kernels.py",
        "cuda",
    ]
    status, out, err = run(command, seconds)
    return {"status": status, "tail": (out + err)[-1500:]}


def tests(seconds: float) -> dict[str, Any]:
    """Run the tests that need a GPU and return the counts of their outcomes."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "tests/views", "tests/data/test_device_cache.py",
               "-k", "gpu or cuda"]  # fmt: skip
    status, out, err = run(command, seconds)
    counts = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", out)
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", out, re.MULTILINE)
    return {
        "status": status,
        **counts,
        "which": failed,
        "tail": (out + err)[-2000:] if status else "",
    }


def step(name: str, seconds: float, images: int = 0) -> dict[str, Any]:
    """Measure one training step by tests/gpu/steps.py. `images` limits the batch of a compiled one, 0 does not."""
    bare = name.removesuffix(", compiled")
    command = [
        sys.executable,
        "tests/gpu/steps.py",
        bare,
        "--trace",
        str(RESULTS.parent / f"{name.replace(', ', '_')}.txt"),
    ]
    if bare != name:
        command += ["--compile", *(["--images", str(images)] if images else [])]
    status, out, err = run(command, seconds)
    return (
        json.loads(out.strip().splitlines()[-1])
        if status == 0 and out.strip()
        else {"error": err.strip()[-1500:] or "out of time"}
    )


def cifar10(seconds: float, data: str, epochs: int) -> dict[str, Any]:
    """Go on with the training, and evaluate it after the last epoch, which `done` of the result tells."""
    folder = ROOT / "runs" / "gpu" / f"simclr_cifar10_{epochs}"
    began = time.monotonic()
    overrides = [
        f"data.root={data}",
        "data.cache=device",
        f"epochs={epochs}",
        f"output={folder}",
        "log.wandb=off",
        "log.every_steps=100",
    ]
    status, out, err = run(
        [sys.executable, "-m", "ssl_pretrain.train", "configs/simclr_cifar10.yaml", *overrides],
        seconds - EVALUATIONS,
    )
    records = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if (folder / "metrics.jsonl").exists()
        else []
    )
    if status not in (0, STOPPED) or not records:
        return {"done": False, "error": err.strip()[-1500:]}
    last = records[-1]
    found = {"done": last["epoch"] >= epochs - 1e-6, "epochs": last["epoch"], "images_per_second": last["images_per_second"],
             "data_wait": last["data_wait"], "seconds": time.monotonic() - began, "warnings": err.strip()[-800:],
             "online": {record["epoch"]: record["knn"] for record in records if "knn" in record}}  # fmt: skip
    if found["done"]:
        for kind in ("knn", "linear"):
            left = max(2.0, seconds - (time.monotonic() - began))
            status, out, err = run(
                [sys.executable, "-m", f"ssl_pretrain.eval.{kind}", str(folder)],
                left / 2 if kind == "knn" else left,
            )
            found[kind] = (out if status == 0 else f"failed: {err}").strip()[-800:]
    return found


def page(results: dict[str, Any]) -> str:
    """Return the text of docs/results/gpu.md for these results."""
    lines = [
        "# On a GPU",
        "",
        f"Made by `{COMMAND}`. The figures are those of the stages in `runs/gpu/results.json`.",
        "",
    ]
    if not results:
        return "\n".join(
            [
                *lines,
                "Not run: no GPU was at hand. The command above runs all of it, in calls of ten minutes, and writes this page.",
                "",
            ]
        )
    found = results.get("tests")
    if found:
        counts = ", ".join(
            f"{found[word]} {word}"
            for word in ("passed", "failed", "skipped", "error", "errors")
            if word in found
        )
        lines += [
            f"Tests: {counts}"
            + (f"; failed: {', '.join(found['which'])}" if found["which"] else "")
            + ".",
            "",
        ]
    measured = {name: results[name] for name in STAGES if "ms" in results.get(name, {})}
    if measured:
        lines += [next(iter(measured.values()))["versions"], ""]
        lines += [
            "| step | images at once | ms | ms for color and copy | images/s | views/s | target, views/s | bare loop's time over ours "
            "| share of loss and optimizer | share of the roofline | share of 790 TFLOP/s | peak GiB | seconds to the first step |",
            "|" + "---|" * 13,
        ]
    for name, one in measured.items():
        roofline = f"{one['of_roofline']:.0%}" if one["of_roofline"] else "-"
        lines.append(
            f"| {name} | {one['images']} | {one['ms']:.1f} | {one['ms_color']:.1f} | {one['images_per_second']:,.0f} "
            f"| {one['views_per_second']:,.0f} | {TARGETS.get(name.removesuffix(', compiled'), '-')} | {one['bare_over_whole']:.2f} "
            f"| {one['loss_and_optimizer']:.1%} | {roofline} | {one['of_790_tflops']:.0%} | {one['peak_gib']:.0f} "
            f"| {one['seconds_to_first_step']:.0f} |"
        )
    lightly = results.get("simclr_resnet50", {}).get("lightly")
    if lightly:
        theirs = (
            lightly
            if isinstance(lightly, str)
            else f"{lightly['images_per_second']:,.0f} images/s. Ours, without color, is {lightly['ours_over_theirs']:.2f} times as fast"
        )
        lines += ["", f"lightly's step of the same network, interleaved with ours: {theirs}."]
    lines += [
        f"\n{name}: {results[name]['error']}" for name in STAGES if "error" in results.get(name, {})
    ]
    trained = results.get("cifar10", {})
    if "epochs" in trained:
        lines += ["", f"SimCLR, ResNet-18, CIFAR-10 on the device: {trained['epochs']:.0f} epochs, {trained['images_per_second']:,.0f} images/s, "
                      f"waiting for data {trained['data_wait']:.1%}."]  # fmt: skip
        for kind, beside in (
            ("knn", "lightly reports 84.8 at 200 epochs"),
            ("linear", "solo-learn reports 90.74 at 1,000 epochs"),
        ):
            if kind in trained:
                lines += ["", f"{kind} ({beside}):", "```", trained[kind], "```"]
    missing = [name for name in STAGES if name not in results]
    lines += ["", f"Not run: {', '.join(missing)}." if missing else "All stages were run.", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="minutes that this call may take (default: %(default)s)",
    )
    parser.add_argument(
        "--copy",
        type=Path,
        help="a folder into which results, profiles and the page are copied after every stage",
    )
    parser.add_argument(
        "--page",
        type=Path,
        default=RESULTS.with_name("gpu.md"),
        help="where the table goes, such as docs/results/gpu.md",
    )
    parser.add_argument(
        "--data",
        default="../shared/data/cifar10.zip",
        help="CIFAR-10: a zip or folder with train/CLASS and test/CLASS",
    )
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument(
        "--only",
        nargs="*",
        default=list(STAGES),
        choices=list(STAGES),
        metavar="STAGE",
        help=f"of: {', '.join(STAGES)}",
    )
    parser.add_argument(
        "--again",
        nargs="*",
        default=[],
        choices=list(STAGES),
        metavar="STAGE",
        help="forget what was measured of these",
    )
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: no CUDA device here; nothing was run", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * options.minutes
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.again:
        results.pop(name, None)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for name in [name for name in STAGES if name in options.only]:
        left = end - time.monotonic()
        if (name in results and results[name].get("done", True)) or left < LEAST.get(name, 40.0):
            continue
        print(f"--- {name}, {left:.0f} s left", flush=True)
        if name == "sanitizer":
            results[name] = sanitizer(min(left, MOST[name]))
        elif name == "tests":
            results[name] = tests(left)
        elif name == "cifar10":
            results[name] = cifar10(left, options.data, options.epochs)
        else:
            eager = results.get(name.removesuffix(", compiled"), {})
            results[name] = step(
                name, min(left, 300.0 if "compiled" in name else 150.0), int(eager.get("images", 0))
            )
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        options.page.write_text(page(results))
        if options.copy:  # after every stage: what comes later may be cut off
            for path in {
                options.page,
                *RESULTS.parent.glob("*.*"),
                *RESULTS.parent.glob("*/metrics.jsonl"),
            }:
                shutil.copy(path, options.copy)
        print(json.dumps(results[name])[:600], flush=True)
    left = [
        name for name in options.only if not results.get(name, {"done": False}).get("done", True)
    ]
    print("all is done" if not left else f"not done yet: {', '.join(left)}; call again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
