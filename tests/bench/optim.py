"""Time one LARS step on ResNet-50's 159 parameters: ours, timm's class and a plain loop.

PYTHONPATH=. .venv/bin/python tests/bench/optim.py [--backbone resnet50] [--repeats 15]
"""

import argparse

import timm
import torch
from measure import HALFWAY, time_interleaved, versions
from timm.optim.lars import Lars

from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig

CONFIG = OptimConfig(name="lars", weight_decay=1e-4, base_lr=0.3)


class LoopLARS:
    """LARS as a plain loop over tensors."""

    def __init__(self, groups):
        self.groups = groups
        self.buffers = {p: torch.zeros_like(p) for group in groups for p in group["params"]}

    @torch.no_grad()
    def step(self):
        for group in self.groups:
            for p in group["params"]:
                update = p.grad
                if group["adapt"]:
                    update = update + group["weight_decay"] * p
                    weight_norm, update_norm = p.norm(), update.norm()
                    is_defined = (weight_norm > 0) & (update_norm > 0)
                    trust = torch.where(is_defined, 0.001 * weight_norm / update_norm, 1.0)
                    update = update * trust
                self.buffers[p].mul_(0.9).add_(update, alpha=4.8)
                p.sub_(self.buffers[p])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def build_network():
        torch.manual_seed(0)
        model = timm.create_model(options.backbone, num_classes=0).to(device)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        return model

    models = {name: build_network() for name in ("ours", "timm", "loop")}
    ours = optim.build(CONFIG, models["ours"])
    optim.set_rates(ours, CONFIG, HALFWAY, 100, 4096)
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in optim.parameter_groups(CONFIG, models["timm"])
    ]
    theirs = Lars(groups, lr=4.8, momentum=0.9)
    loop = LoopLARS(optim.parameter_groups(CONFIG, models["loop"]))
    runs = {"ours": ours.step, "timm": theirs.step, "loop": loop.step}
    for run in runs.values():
        run()
    print(versions("timm"))
    seconds = time_interleaved(runs, options.repeats, device)
    num_parameters = len(list(models["ours"].parameters()))
    print(
        f"{options.backbone}: {num_parameters} parameters; one step, median of {options.repeats}, "
        "in turn"
    )
    for name, value in seconds.items():
        print(f"{name:6s} {1e3 * value:8.2f} ms")
    ratios = [f"lars_vs_{name}={seconds[name] / seconds['ours']:.2f}" for name in ("timm", "loop")]
    print("ratios:", *ratios)


if __name__ == "__main__":
    main()
