"""Run everything that needs a GPU.

    python tests/gpu/run.py --data cifar10.zip                   # repeat until all stages are done
    python tests/gpu/run.py --only cifar10 --epochs 1000         # the published number of epochs
    python tests/gpu/run.py --again simclr_resnet50              # repeat one stage

The stages, the most valuable first, check the kernels with compute-sanitizer, run the
tests of tests/gpu, measure training steps with tests/gpu/steps.py, and train and evaluate SimCLR
with ResNet-18 on CIFAR-10, with the data set on the device. Then come two NCCL ranks on one device,
the loss kernels against public ones, and the other steps. Each call takes at most --minutes, and
the next call continues with the missing stages. After every stage the results are written to
runs/gpu/results.json and the table to runs/gpu/gpu.md or to --page. A training run that was
stopped resumes from its checkpoint.

For a machine without network access, `make gpu-kit` packs what is needed and prints the commands.
The machine must have torch, torchvision, timm, numba, numpy, safetensors and pytest. FFCV, faiss
and wandb are not needed (log.wandb is off).
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "runs" / "gpu" / "results.json"
FIRST_STEPS = (
    "simclr_resnet50",
    "barlow_twins_vit_small",
    "moco_v3_vit_small, compiled",
    "moco_v3_vit_base, compiled",
)
OTHER_STEPS = (
    "simclr_resnet50, compiled",
    "barlow_twins_vit_small, compiled",
    "moco_v3_vit_small",
    "moco_v3_vit_base",
    "swav_resnet50_multicrop",
    "dino_vit_small",
    "dino_vit_small, compiled",
    "vit_large_simclr",
    "vit_large_simclr, compiled",
    "swav_resnet50_multicrop, compiled",
    "dino_vit_base",
)
# Targets in views per second on an H200: three times the published 871 images/s of two views.
TARGETS = {
    "simclr_resnet50": 6500,
    "moco_v3_vit_small": 9000,
    "moco_v3_vit_base": 3000,
    "barlow_twins_vit_small": 5226,
}
# Published images per second of two views of 224 pixels on one H200, by stable-pretraining.
PUBLISHED = {
    "barlow_twins_vit_small": 871,
    "vit_large_simclr": 412,
    "vit_large_simclr, compiled": 481,
}
SCRIPTS = {"nccl": "tests/gpu/nccl.py", "loss_kernels": "tests/gpu/losses.py"}
STAGES = ("sanitizer", "tests", *FIRST_STEPS, "cifar10", *SCRIPTS, *OTHER_STEPS)
COMMAND = "python tests/gpu/run.py --data cifar10.zip"
MIN_SECONDS = {"tests": 90.0, "cifar10": 120.0}  # a stage does not start with less time left
MAX_SECONDS = {"sanitizer": 240.0, "script": 150.0, "step": 150.0, "compiled step": 300.0}
STOPPED = 75  # exit status of a training run that was stopped and saved a checkpoint
GRACE_SECONDS = 30.0  # between SIGTERM and SIGKILL, included in the time of a stage
EVALUATION_SECONDS = 100.0  # reserved for k-NN and the linear probe after training


def run_command(command: list[str], seconds: float) -> tuple[int, str, str]:
    """Run a command for at most `seconds` and return its status, output and errors.

    The command gets SIGTERM early enough to stop in time, and SIGKILL at the end.
    """
    grace = min(GRACE_SECONDS, seconds / 2)
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


def run_sanitizer(seconds: float) -> dict[str, Any]:
    """Run the kernels under compute-sanitizer, which finds reads and writes out of bounds.

    Args:
        seconds: Time limit. The kernels of the losses and those of color get half of it each.
    """
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"error": "compute-sanitizer is not installed"}
    sanitizer = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_gpu_views.py"]
    commands = {
        "losses": ["tests/losses/kernels.py", "cuda"],
        "color": [*pytest, "-k", "color"],
    }
    result: dict[str, Any] = {}
    for name, command in commands.items():
        status, out, err = run_command([*sanitizer, *command], seconds / 2)
        result[name] = {"status": status, "tail": (out + err)[-1500:]}
    return result


def run_script(name: str, seconds: float) -> dict[str, Any]:
    """Run one of `SCRIPTS` and return its line of JSON."""
    status, out, err = run_command([sys.executable, SCRIPTS[name]], seconds)
    if status == 0 and out.strip():
        return json.loads(out.strip().splitlines()[-1])
    return {"error": err.strip()[-1500:] or "out of time"}


def run_tests(seconds: float) -> dict[str, Any]:
    """Run the tests that need a GPU and return the counts of their outcomes."""
    paths = ["tests/gpu", "tests/views", "tests/data/test_device_cache.py"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*pytest, *paths, "-k", "gpu or cuda"]
    status, out, err = run_command(command, seconds)
    outcomes = re.findall(r"(\d+) (passed|failed|skipped|errors?)", out)
    return {
        "status": status,
        **{outcome: int(count) for count, outcome in outcomes},
        "which": re.findall(r"^(?:FAILED|ERROR) (\S+)", out, re.MULTILINE),
        "tail": (out + err)[-2000:] if status else "",
    }


def measure_step(name: str, seconds: float, images: int = 0) -> dict[str, Any]:
    """Measure one training step with tests/gpu/steps.py.

    Args:
        name: Name of the step.
        seconds: Time limit.
        images: Largest batch of a compiled step. 0 means no limit.
    """
    eager = name.removesuffix(", compiled")
    trace = RESULTS.parent / f"{name.replace(', ', '_')}.txt"
    command = [sys.executable, "tests/gpu/steps.py", eager, "--trace", str(trace)]
    if eager != name:
        command += ["--compile", *(["--images", str(images)] if images else [])]
    status, out, err = run_command(command, seconds)
    if status == 0 and out.strip():
        return json.loads(out.strip().splitlines()[-1])
    return {"error": err.strip()[-1500:] or "out of time"}


def train_cifar10(seconds: float, data: str, epochs: int) -> dict[str, Any]:
    """Continue training on CIFAR-10. After the last epoch, evaluate the run and set `done`."""
    folder = ROOT / "runs" / "gpu" / f"simclr_cifar10_{epochs}"
    start = time.monotonic()
    overrides = [
        f"data.root={data}",
        "data.cache=device",
        f"epochs={epochs}",
        f"output={folder}",
        "log.wandb=off",
        "log.every_steps=100",
    ]
    command = [sys.executable, "-m", "ssl_pretrain.train", "configs/simclr_cifar10.yaml"]
    status, out, err = run_command([*command, *overrides], seconds - EVALUATION_SECONDS)
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if status not in (0, STOPPED) or not records:
        return {"done": False, "error": err.strip()[-1500:]}
    last = records[-1]
    result = {
        "done": last["epoch"] >= epochs - 1e-6,
        "epochs": last["epoch"],
        "images_per_second": last["images_per_second"],
        "data_wait": last["data_wait"],
        "seconds": time.monotonic() - start,
        "warnings": err.strip()[-800:],
        "online": {record["epoch"]: record["knn"] for record in records if "knn" in record},
    }
    if result["done"]:
        for kind in ("knn", "linear"):
            seconds_left = max(2.0, seconds - (time.monotonic() - start))
            command = [sys.executable, "-m", f"ssl_pretrain.eval.{kind}", str(folder)]
            status, out, err = run_command(
                command, seconds_left / 2 if kind == "knn" else seconds_left
            )
            result[kind] = (out if status == 0 else f"failed: {err}").strip()[-800:]
    return result


HEADER = (
    "step",
    "images at once",
    "ms",
    "ms for color and copy",
    "images/s",
    "views/s",
    "target, views/s",
    "published, images/s",
    "bare loop's time over ours",
    "lightly's time over ours, both without color",
    "color, loss and optimizer (target 5%)",
    "share of the roofline",
    "share of 790 TFLOP/s",
    "peak GiB",
    "seconds to the first step",
)


INTRODUCTION = (
    "This page is for anyone who wants to know how fast training is on a GPU, and which tests ran "
    f"on one. It is generated by `{COMMAND}`, from the results of the stages in "
    "`runs/gpu/results.json`."
)
DEFINITION = (
    "A step includes the copy of uint8 crops from pinned memory, color, forward pass, backward "
    "pass, loss and optimizer. It has no loader. Only the run on CIFAR-10 has one. Views per "
    "second count the student's views, not the teacher's. The bare loop trains the same network "
    "alone, compiled if ours is: forward pass of the student's views, backward pass, fused SGD. "
    "The loops of a row are interleaved in one call."
)


def render_page(results: dict[str, Any]) -> str:
    """Return the text of docs/results/gpu.md for these results."""
    lines = ["# One GPU", "", wrap(INTRODUCTION), "", wrap(DEFINITION), ""]
    if not results:
        lines.append(
            "Not run: no GPU was available. The command above runs all stages, in calls of ten "
            "minutes, and writes this page."
        )
        return "\n".join([*lines, ""])
    if "losses" in (sanitizer := results.get("sanitizer", {})):
        outcomes = ", ".join(
            f"{name} {'failed' if sanitizer[name]['status'] else 'clean'}" for name in sanitizer
        )
        lines += [f"compute-sanitizer: {outcomes}.", ""]
    if tests := results.get("tests"):
        outcomes = ("passed", "failed", "skipped", "error", "errors")
        counts = ", ".join(
            f"{tests[outcome]} {outcome}" for outcome in outcomes if outcome in tests
        )
        failed = f"; failed: {', '.join(tests['which'])}" if tests["which"] else ""
        lines += [f"Tests: {counts}{failed}.", ""]
    steps = {name: results[name] for name in STAGES if "ms" in results.get(name, {})}
    if steps:
        lines += [next(iter(steps.values()))["versions"], ""]
        lines += [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    for name, result in steps.items():
        lines.append(f"| {' | '.join(format_step_cells(name, result))} |")
    lines += format_peer_lines(steps)
    lines += [
        f"\n{name}: {results[name]['error']}" for name in STAGES if "error" in results.get(name, {})
    ]
    lines += format_cifar10_lines(results.get("cifar10", {}))
    if outcome := results.get("nccl", {}).get("nccl"):
        lines += ["", f"Two NCCL ranks on one GPU: {outcome}."]
    lines += format_loss_lines(results.get("loss_kernels", {}).get("sizes", {}))
    lines += format_share_lines(steps)
    missing = [name for name in STAGES if name not in results]
    outcome = f"Not run: {'; '.join(missing)}." if missing else "All stages were run."
    return "\n".join([*lines, "", wrap(outcome), ""])


def wrap(text: str) -> str:
    """Return a paragraph in lines of at most 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def format_step_cells(name: str, result: dict[str, Any]) -> list[str]:
    """Return a step's table cells, in the order of `HEADER`."""
    lightly = result.get("lightly")
    return [
        name,
        f"{result['images']}",
        f"{result['ms']:.1f}",
        f"{result['ms_color']:.1f}",
        f"{result['images_per_second']:,.0f}",
        f"{result['views_per_second']:,.0f}",
        f"{TARGETS.get(name.removesuffix(', compiled'), '-')}",
        f"{PUBLISHED.get(name, '-')}",
        f"{result['bare_over_whole']:.2f}",
        f"{lightly['ours_over_theirs']:.2f}" if isinstance(lightly, dict) else "-",
        f"{result['color_loss_and_optimizer']:.1%}",
        f"{result['of_roofline']:.0%}" if result["of_roofline"] else "-",
        f"{result['of_790_tflops']:.0%}",
        f"{result['peak_gib']:.0f}",
        f"{result['seconds_to_first_step']:.0f}",
    ]


def format_peer_lines(steps: dict[str, dict[str, Any]]) -> list[str]:
    """Return one line per step about lightly's loop, and one about the other libraries."""
    lines = []
    for name, result in steps.items():
        lightly = result.get("lightly")
        if isinstance(lightly, dict):
            lightly = (
                f"{lightly['images_per_second']:,.0f} images/s, its bare loop's share "
                f"{lightly['bare_over_theirs']:.2f}"
            )
        if lightly:
            lines += ["", f"lightly's step beside {name}: {lightly}."]
    others = next((result["other_peers"] for result in steps.values()), {})
    return [*lines, *(f"\n{peer}: {text}." for peer, text in others.items())]


def format_loss_lines(sizes: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table of the loss kernels' times."""
    if not sizes:
        return []
    lines = ["", "| loss, forward and backward | size | ms | added MiB |", "|---|---|---|---|"]
    for size, losses in sizes.items():
        for name, value in losses.items():
            cells = f"{value} | -"
            if isinstance(value, dict):
                cells = f"{value['ms']:.2f} | {value['added_mib']:,.0f}"
            lines.append(f"| {name} | {size} | {cells} |")
    return lines


def format_share_lines(steps: dict[str, dict[str, Any]]) -> list[str]:
    """Return the entries for `ssl_pretrain/planning/measured_shares.py`, one per kind of network.

    If several steps have the same kind of network, the lowest share is listed.
    """
    entries: dict[tuple[str, str, bool], tuple[float, str]] = {}
    for name, result in steps.items():
        if result.get("gpu") is None:
            continue
        for network, compiled, share in (
            (result["network"], result["compiled"], result["of_roofline"]),
            ("color and copy", False, result["color_of_roofline"]),
        ):
            key = result["gpu"], network, compiled
            entries[key] = min(entries.get(key, (share, name)), (share, name))
    if not entries:
        return []
    return [
        "",
        "Entries for `MEASURED_SHARES` in `ssl_pretrain/planning/measured_shares.py`, without the "
        "revision:",
        "```",
        *(
            f"MeasuredShare{(*key, round(share, 2), name)},"
            for key, (share, name) in entries.items()
        ),
        "```",
    ]


def format_cifar10_lines(result: dict[str, Any]) -> list[str]:
    """Return the lines about the training on CIFAR-10."""
    if "epochs" not in result:
        return []
    lines = [
        "",
        f"SimCLR, ResNet-18, CIFAR-10 on the device: {result['epochs']:.0f} epochs, "
        f"{result['images_per_second']:,.0f} images/s with the loader, "
        f"waiting for data {result['data_wait']:.1%} (target 3%).",
    ]
    for kind, published in (
        ("knn", "lightly reports 84.8 at 200 epochs"),
        ("linear", "solo-learn reports 90.74 at 1,000 epochs"),
    ):
        if kind in result:
            lines += ["", f"{kind} ({published}):", "```", result[kind], "```"]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_option = parser.add_argument
    stages = {"nargs": "*", "choices": list(STAGES), "metavar": "STAGE"}
    page_path = RESULTS.with_name("gpu.md")
    data_folder = Path(os.environ.get("SSL_PRETRAIN_DATA", ROOT.parent / "shared" / "data"))
    cifar10_path = data_folder / "cifar10.zip"
    add_option("--minutes", type=float, default=8.0, help="time limit of this call")
    add_option("--copy", type=Path, help="folder to copy results into after every stage")
    add_option("--page", type=Path, default=page_path, help="where to write the table")
    add_option("--data", default=cifar10_path, help="CIFAR-10 with train/CLASS and test/CLASS")
    add_option("--epochs", type=int, default=200)
    add_option(
        "--only", default=list(STAGES), help=f"one or more of: {', '.join(STAGES)}", **stages
    )
    add_option("--again", default=[], help="discard the results of these stages", **stages)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: no CUDA device was found; nothing was run", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * options.minutes
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.again:
        results.pop(name, None)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for name in [name for name in STAGES if name in options.only]:
        seconds_left = end - time.monotonic()
        if (name in results and results[name].get("done", True)) or seconds_left < MIN_SECONDS.get(
            name, 40.0
        ):
            continue
        print(f"--- {name}, {seconds_left:.0f} s left", flush=True)
        if name == "sanitizer":
            results[name] = run_sanitizer(min(seconds_left, MAX_SECONDS["sanitizer"]))
        elif name == "tests":
            results[name] = run_tests(seconds_left)
        elif name == "cifar10":
            results[name] = train_cifar10(seconds_left, options.data, options.epochs)
        elif name in SCRIPTS:
            results[name] = run_script(name, min(seconds_left, MAX_SECONDS["script"]))
        else:
            eager = results.get(name.removesuffix(", compiled"), {})
            limit = MAX_SECONDS["compiled step" if "compiled" in name else "step"]
            results[name] = measure_step(
                name, min(seconds_left, limit), int(eager.get("images", 0))
            )
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        options.page.write_text(render_page(results))
        if options.copy:  # after every stage, because the call may be killed in a later one
            results_files = (*RESULTS.parent.glob("*.*"), *RESULTS.parent.glob("*/metrics.jsonl"))
            for path in {options.page, *results_files}:
                shutil.copy(path, options.copy)
        print(json.dumps(results[name])[:600], flush=True)
    unfinished = [
        name for name in options.only if not results.get(name, {"done": False}).get("done", True)
    ]
    print(
        f"not done yet: {', '.join(unfinished)}; call again"
        if unfinished
        else "all stages are done"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
