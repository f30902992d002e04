"""The first mistakes of newcomers: each is answered in one or two lines that name the remedy.

The docs' page on troubleshooting lists the same mistakes and answers.
"""

import contextlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import ssl_pretrain
from ssl_pretrain import cli
from ssl_pretrain.planning.run_settings import build_tree
from ssl_pretrain.system import program

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
IMAGES = np.zeros((120, 20, 20, 3), np.uint8)

# The answer on stderr, by command line after `ssl-pretrain`. PROGRAM stands for `ssl-pretrain`
# and FOLDER for the current folder.
COMMANDS = {
    "trian my.yaml": (
        "error: 'trian' is not a sub-command. Did you mean 'train'? `PROGRAM --help` lists all"
    ),
    "train": (
        "error: the following arguments are required: config. `PROGRAM train --help` lists the "
        "options"
    ),
    "train epochs=5": (
        "error: epochs=5: a setting, not a preset or a YAML; give one of these first, as in "
        "simclr_cifar10 epochs=5"
    ),
    "train photos": (
        "error: photos: a folder, not a preset or a YAML; give a preset first, and the images as "
        "data.root=photos"
    ),
    "simclr_cifar10": (
        "error: 'simclr_cifar10' is a preset, not a sub-command; run `PROGRAM train simclr_cifar10`"
    ),
    "train simclr_cifr10": (
        "error: simclr_cifr10: no such file or preset. The nearest are simclr_cifar10, "
        "simclr_cifar10_cpu, nnclr_cifar10; `PROGRAM list configs` lists all presets"
    ),
    "train tabs.yaml": (
        "error: tabs.yaml: not valid YAML at line 2: found character that cannot start any token. "
        "Indent with spaces instead of tabs"
    ),
    "train list.yaml": (
        "error: list.yaml: a configuration must be a mapping of keys, got a list; write each key "
        "as 'key: value'"
    ),
    "train --config my.yaml": (
        "error: unrecognized arguments: --config. Give the preset or the YAML first, without an "
        "option"
    ),
    "train my.yaml --epochs 5": (
        "error: unrecognized arguments: --epochs 5. Settings have no dashes: epochs=5"
    ),
    "train my.yaml --lr=0.1": (
        "error: unrecognized arguments: --lr=0.1. Settings have no dashes: optim.base_lr=0.1"
    ),
    "train my.yaml --device cuda": (
        "error: unrecognized arguments: --device cuda. A run uses the GPUs that it sees; "
        "CUDA_VISIBLE_DEVICES= hides them"
    ),
    "train my.yaml epochs:5": "error: 'epochs:5': not an override; write epochs=5",
    "train my.yaml optim.base_lr = 0.1": (
        "error: 'optim.base_lr': not an override; give key=value without spaces, such as "
        "optim.base_lr=0.3"
    ),
    "train my.yaml views.crops.global.scale=[0.2, 1.0]": (
        "error: '1.0]': not an override; quote a list or a mapping: "
        "'views.crops.global.scale=[0.2, 1.0]'"
    ),
    "help lr": (
        "error: lr: no such key. Did you mean 'optim.base_lr'? `PROGRAM help` lists the keys"
    ),
    "list methods simcrl": (
        "error: list methods: none has 'simcrl' in its name; `PROGRAM list methods` lists all"
    ),
    "train my.yaml lr=0.1": (
        "error: my.yaml: lr: no such key. Did you mean 'optim.base_lr'? `PROGRAM help` lists the "
        "keys"
    ),
    "train my.yaml optim.lr=0.1": (
        "error: my.yaml: optim.lr: no such key. Did you mean 'base_lr'? `PROGRAM help optim` "
        "lists the keys there"
    ),
    "train my.yaml batch_size=64": (
        "error: my.yaml: batch_size: no such key. Did you mean 'global_batch_size'? `PROGRAM "
        "help` lists the keys"
    ),
    "train my.yaml optim.wd=0.1": (
        "error: my.yaml: optim.wd: no such key. Did you mean 'weight_decay'? `PROGRAM help optim` "
        "lists the keys there"
    ),
    "train my.yaml weight_decay=0.1": (
        "error: my.yaml: weight_decay: no such key. Did you mean 'optim.weight_decay'? `PROGRAM "
        "help` lists the keys"
    ),
    "train my.yaml arch=resnet50": (
        "error: my.yaml: arch: no such key. Did you mean 'backbone.name'? `PROGRAM help` lists "
        "the keys"
    ),
    "train my.yaml optim.lr_schedule=cosine": (
        "error: my.yaml: optim.lr_schedule: no such key. Did you mean 'schedule'? `PROGRAM help "
        "optim` lists the keys there"
    ),
    "train my.yaml gpus=2": (
        "error: my.yaml: gpus: no such key. Did you mean 'launch.ranks'? `PROGRAM help` lists the "
        "keys"
    ),
    "train my.yaml workers=4": (
        "error: my.yaml: workers: no such key. Did you mean 'data.num_workers'? `PROGRAM help` "
        "lists the keys"
    ),
    "train my.yaml out=runs/new": (
        "error: my.yaml: out: no such key. Did you mean 'output'? `PROGRAM help` lists the keys"
    ),
    "train my.yaml temp=0.1": (
        "error: my.yaml: temp: no such key. Did you mean 'method.temperature'? `PROGRAM help` "
        "lists the keys"
    ),
    "train my.yaml device=cuda": (
        "error: my.yaml: device: no such key. A run uses the GPUs that it sees; "
        "CUDA_VISIBLE_DEVICES= hides them"
    ),
    "train my.yaml method=dino": (
        "error: my.yaml: method: 'dino' is not a section; write method.name=dino"
    ),
    "train my.yaml data=photos": (
        "error: my.yaml: data: 'photos' is not a section; write data.root=photos"
    ),
    "train my.yaml log.wandb.project=mine": (
        "error: my.yaml: log.wandb.project: no such key. log.wandb is a single value. Did you "
        "mean 'log.project'?"
    ),
    "train my.yaml method.queue_size=100": (
        "error: my.yaml: method.queue_size: no such key. It is one of moco, nnclr, swav. Allowed: "
        "name, temperature, projector_dims, without_projector"
    ),
    "train my.yaml views.crops.globl.size=16": (
        "error: my.yaml: views.crops.globl: the recipe has no crop of this name. Did you mean "
        "'global'?"
    ),
    "train my.yaml optim.base_lr=0,001": (
        "error: my.yaml: optim.base_lr: '0,001' is not a number; write one such as 0.3 or 1e-6"
    ),
    "train my.yaml optim.base_lr=-1": (
        "error: my.yaml: optim.base_lr: -1.0 is out of range; give a finite number >= 0"
    ),
    "train my.yaml epochs=0.5": (
        "error: my.yaml: epochs: '0.5' is not a whole number; write one in decimal digits, such "
        "as 100"
    ),
    "train my.yaml epochs=-3": (
        "error: my.yaml: epochs: -3 is out of range; give a whole number >= 1 and <= 2147483647"
    ),
    "train my.yaml seed=-1": (
        "error: my.yaml: seed: -1 is out of range; give a whole number >= 0 and <= "
        "9223372036854775807"
    ),
    "train my.yaml method.name=simcrl": (
        "error: my.yaml: method.name: 'simcrl' is not a method. Did you mean 'simclr'? `PROGRAM "
        "list methods` lists all; a method of your own is package.module"
    ),
    "train my.yaml method.temperature=0": (
        "error: my.yaml: method.temperature: 0.0 is out of range; give a finite number > 0"
    ),
    "train my.yaml optim.name=Adam": (
        "error: my.yaml: optim.name: 'Adam' is not known; choose one of: lars, larc, adamw, adam, "
        "sgd, lamb, adan, timm:lion, timm:muon, torch:adadelta, torch:adamax, torch:nadam, "
        "torch:radam, torch:rmsprop"
    ),
    "train my.yaml parallel.precision=fp16": (
        "error: my.yaml: parallel.precision: 'fp16' is not known; choose one of: auto, float32, "
        "bfloat16, float64"
    ),
    "train my.yaml log.wandb=true": (
        "error: my.yaml: log.wandb: 'true' is not known; choose one of: auto, online, offline, off"
    ),
    "train my.yaml data.num_workers=-1": (
        "error: my.yaml: data.num_workers: -1 is out of range; give a whole number >= 0 and <= 1024"
    ),
    "train my.yaml views.crops.global.scale=[1.0,0.2]": (
        "error: views.crops.global.scale: [1.0, 0.2] is not a range; give [low, high] with 0 < "
        "low <= high <= 1"
    ),
    "train my.yaml backbone.name=resnet-50": (
        "error: backbone.name: 'resnet-50' is not a timm model. Did you mean 'resnet50' or "
        "'resnet50t' or 'resnet50s'? `PROGRAM list backbones` lists all"
    ),
    "train my.yaml backbone.name=vit_small_patch16_224": (
        "error: backbone.stem: no_pool and small are for ResNets, and vit_small_patch16_224 has "
        "no convolution and max-pooling stem; use imagenet, with args.patch_size for a ViT"
    ),
    "train my.yaml backbone.init=imagenet": (
        "error: backbone.init: 'imagenet' does not exist; give random, timm:<tag>, a weights file "
        "or the folder of a run"
    ),
    "train my.yaml micro_batch_size=7": (
        "error: micro_batch_size: 7 does not divide this rank's share of 24 (global_batch_size 24 "
        "/ 1 ranks); give a divisor of 24, 0 for the whole share, or auto"
    ),
    "train my.yaml output=notes.txt": (
        "error: output: notes.txt cannot be written to: File exists; give another output"
    ),
    "train my.yaml data.root=photo": (
        "error: data.root: photo does not exist. Did you mean 'photos'? Give a folder, a .zip, a "
        ".beton, tar shards, a .parquet, an .npz, or a list of files (.csv, .tsv, .txt)"
    ),
    "train my.yaml data.root=": (
        "error: data.root: no path is set; give a folder, a .zip, a .beton, tar "
        "shards, a .parquet, an .npz, or a list of files (.csv, .tsv, .txt), as in "
        "data.root=/data/imagenet"
    ),
    "train my.yaml data.root=empty": (
        "error: data.root: empty contains no image that Pillow can decode, at any depth; give the "
        "folder of your images"
    ),
    "train my.yaml data.root=texts": (
        "error: data.root: texts contains no image that Pillow can decode, at any depth; give the "
        "folder of your images; left out in FOLDER/texts: 1 .txt files (first: notes.txt)"
    ),
    "train my.yaml data.root=notes.txt": (
        "error: data.root: notes.txt begins with 'hello', which is not in FOLDER; write paths "
        "relative to the list's folder"
    ),
    "train my.yaml data.root=table.xlsx": (
        "error: data.root: table.xlsx is a table of an unsupported kind; save it as .csv, with "
        "the columns path and label"
    ),
    "train my.yaml data.root=https://example.org/photos.zip": (
        "error: data.root: https://example.org/photos.zip is not a .tar, and other files are not "
        "read from a store; download it and give its path"
    ),
    "train my.yaml global_batch_size=1000": (
        "error: global_batch_size: 1000 is more than the 78 images of the data set; give at most 78"
    ),
    "inspect photo": (
        "error: data.root: photo does not exist. Did you mean 'photos'? Give a folder, a .zip, a "
        ".beton, tar shards, a .parquet, an .npz, or a list of files (.csv, .tsv, .txt)"
    ),
    "train my.yaml optim.base_lr=1.0 epochs=1": (
        "error: runs/mine/checkpoints/step_00000003 was saved with a different configuration: "
        "optim.base_lr was 4.0 and is now 1.0. Choose a new output, or start a new run from its "
        "weights with backbone.init=runs/mine"
    ),
    "train my.yaml launch.nodes=2": (
        "error: launch.nodes: 2: only SLURM jobs use this key, and this command submits nothing; "
        "use `PROGRAM pretrain`, or remove such keys"
    ),
    "train my.yaml launch.cluster=slurm": (
        "error: launch.cluster: slurm: only `PROGRAM pretrain` uses this key, and this command "
        "trains in its own process; use `PROGRAM pretrain`, or remove this key"
    ),
    "train my.yaml launch.ranks=2": (
        "error: launch.ranks: 2: only `PROGRAM pretrain` uses this key, and this command trains "
        "in its own process; use `PROGRAM pretrain`, or remove this key"
    ),
    "pretrain my.yaml launch.nodes=2": (
        "error: launch.nodes: 2: only SLURM jobs use this key, and this machine has no sbatch; "
        "remove such keys to train on this machine (launch.ranks sets the processes per machine, "
        "and launch.hosts lists the machines), or add launch.cluster=slurm --plan to see the job"
    ),
    "pretrain my.yaml evaluation.at_end=[knnn]": (
        "error: evaluation.at_end: 'knnn' is not an evaluation; choose among: knn, linear, "
        "attentive, spectrum, retrieval, robustness, semi, finetune, zeroshot, captions, sts, "
        "text_pairs, export, report"
    ),
    "plan my.yaml plan.gpu=H900": (
        "error: my.yaml: plan.gpu: 'H900' is not known; choose one of: '', H100, H200, A100, L40S"
    ),
    "knn runs/nope": (
        "ssl_pretrain.eval.knn: runs/nope: no such run folder; give the `output` of a run's config"
    ),
    "knn photos": (
        "ssl_pretrain.eval.knn: photos: no checkpoint found (looked for "
        "photos/checkpoints/step_*); give the folder of a run that has saved one"
    ),
    "evaluate photos": "error: photos: has no config.yaml, so it is no run; give the output of one",
    "knn runs/mine --device cuda": (
        "ssl_pretrain.eval.knn: device: cuda is not on this machine, where torch sees 0 GPUs; "
        "give cpu or auto"
    ),
    "knn runs/mine data.root=flat": (
        "ssl_pretrain.eval.knn: data.root: k-NN needs labels, and flat has no labeled images; put "
        "the images in one folder per class (<class>/<file>), or list them in a CSV as path,label"
    ),
    "knn runs/mine k=5": (
        "ssl_pretrain.eval.knn: 'k=5': an evaluation only accepts key=value settings of data, "
        "evaluation, text.templates, log.bands and parallel.precision, such as data.root=/new/place"
    ),
    "report photos": (
        "ssl_pretrain.eval.report: photos: no checkpoint found (looked for "
        "photos/checkpoints/step_*); give the folder of a run that has saved one"
    ),
    "compare runs/mine photos": (
        "ssl_pretrain.eval.compare: photos: there is no config.yaml, so this is not a run folder; "
        "give the `output` of a run's config"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images, wrong files of several kinds and a finished run of one epoch."""
    path = tmp_path_factory.mktemp("first_mistakes")
    with contextlib.chdir(path):
        tiny.write_images(Path("photos"))
        text = tiny.YAML.replace("data: {", "data: {root: photos, cache_dir: cache, ")
        Path("my.yaml").write_text(f"{text}output: runs/mine\n")
        Path("empty").mkdir()
        Path("texts").mkdir()
        Path("texts/notes.txt").write_text("hello")
        Path("notes.txt").write_text("hello")
        Path("table.xlsx").write_bytes(b"PAR1")
        Path("tabs.yaml").write_text("data:\n\troot: photos\n")
        Path("list.yaml").write_text("- epochs: 5\n")
        Path("noconfig.py").write_text("class Method: pass\n")
        Path("own.py").write_text("def load(split): return None\n")
        Path("flat").mkdir()
        for number in range(30):
            Image.new("RGB", (20, 20), (number * 5, 9, 9)).save(f"flat/{number}.png")
        assert run_command(["train", "my.yaml", "epochs=1"])[0] == 0
    return path


def run_command(arguments: list[str]) -> tuple[int, str]:
    """Run the command in this process and return its status and its text on stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = cli.main(arguments)
        except SystemExit as exit:
            status = exit.code
    return status, errors.getvalue()


def _find_all_but_sbatch(command, *arguments, find=shutil.which, **options):
    return None if command == "sbatch" else find(command, *arguments, **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_on_the_command_line_is_answered_with_its_remedy(folder, monkeypatch, command):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(shutil, "which", _find_all_but_sbatch)  # SLURM would change a message
    status, errors = run_command(command.split(" "))
    lines = [line for line in errors.splitlines() if not line.startswith("data: training ")]
    answer = COMMANDS[command].replace("PROGRAM", program.name()).replace("FOLDER", str(folder))
    assert (status, lines) == (2, [answer])


class Items(Dataset):
    """A data set whose items are made by a function."""

    def __init__(self, make_item, length=120):
        self.make_item, self.length = make_item, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.make_item(index)


def pretrain(*arguments, **settings):
    return lambda: ssl_pretrain.pretrain(*arguments, output="runs/new", **settings)


# A call and its answer, by the call as a user writes it.
CALLS = {
    'pretrain("photo")': (
        pretrain("photo"),
        "data.root: photo does not exist. Did you mean 'photos'? Give a folder, a .zip, a .beton, "
        "tar shards, a .parquet, an .npz, or a list of files (.csv, .tsv, .txt)",
    ),
    "pretrain(None)": (
        pretrain(None),
        "data: an object of type NoneType is not a data set; give a path, an array, a torch "
        "Dataset with a length, or a Hugging Face dataset",
    ),
    'pretrain(["a.png", "b.png"])': (
        pretrain(["a.png", "b.png"]),
        "data: data[0]: FileNotFoundError: [Errno 2] No such file or directory: 'a.png'; give "
        "images, or paths that exist",
    ),
    "pretrain(DataLoader(dataset))": (
        pretrain(DataLoader(Items(IMAGES.__getitem__))),
        "data: an object of type DataLoader is not a data set; give a path, an array, a torch "
        "Dataset with a length, or a Hugging Face dataset",
    ),
    'pretrain({"image": images})': (
        pretrain({"image": IMAGES}),
        "data: an object of type dict is not a data set; give a path, an array, a torch Dataset "
        "with a length, or a Hugging Face dataset",
    ),
    "pretrain(images[0])": (
        pretrain(IMAGES[0]),
        "data has the shape (20, 20, 3), that of one color image; give the images as (n, height, "
        "width, 3)",
    ),
    "pretrain(images[:0])": (
        pretrain(IMAGES[:0]),
        "data contains no image; give one with images",
    ),
    "pretrain(images[:1])": (
        pretrain(IMAGES[:1]),
        "data.root: data has 1 images, which is too few to learn from; give 16 or more, better "
        "thousands",
    ),
    "pretrain(images_of_40_channels)": (
        pretrain(np.zeros((120, 40, 50, 40), np.uint8)),
        "data: data[0] has the shape (40, 50, 40), not that of an image; give a PIL image, a path, "
        "an array (height, width, channels) or (height, width), or a tensor (channels, height, "
        "width), with integers from 0 to 255 or floats from 0 to 1",
    ),
    "pretrain(images - 2.0)": (
        pretrain(IMAGES - np.float32(2)),
        "data has float32 values from -2 to -2; scale them to integers from 0 to 255 or to floats "
        "from 0 to 1, before any normalization, or set data.range to their lowest and highest "
        "values",
    ),
    "pretrain(dataset_with_normalize)": (
        pretrain(Items(lambda index: torch.full((3, 20, 20), -2.0))),
        "data: data[0] has float32 values from -2 to -2; scale them to integers from 0 to 255 or "
        "to floats from 0 to 1, before any normalization, or set data.range to their lowest and "
        "highest values",
    ),
    "pretrain(dataset_of_names)": (
        pretrain(Items(lambda index: "a.png")),
        "data: data[0]: FileNotFoundError: [Errno 2] No such file or directory: 'a.png'; give "
        "images, or paths that exist",
    ),
    "pretrain(dataset_of_dicts)": (
        pretrain(Items(lambda index: {"pixels": IMAGES[index]})),
        "data[0] has the keys pixels; call the image 'image'",
    ),
    "pretrain(dataset_of_none)": (
        pretrain(Items(lambda index: None)),
        "data[0] is of type NoneType, not an image; give a PIL image, a path, an array (height, "
        "width, channels) or (height, width), or a tensor (channels, height, width), with integers "
        "from 0 to 255 or floats from 0 to 1",
    ),
    "pretrain(empty_dataset)": (
        pretrain(Items(IMAGES.__getitem__, length=0)),
        "data contains no image; give one with images",
    ),
    "pretrain((images, [0, 1]))": (
        pretrain((IMAGES, [0, 1])),
        "data: there are 2 labels for 120 images; give one label per image",
    ),
    "pretrain((images, one_hot_labels))": (
        pretrain((IMAGES, np.eye(120))),
        "data: the labels have the shape (120, 120); give one number or name per image",
    ),
    'pretrain(images, val="photos")': (
        pretrain(IMAGES, val="photos"),
        "val: is a path, but data is an object; give both in the same way",
    ),
    "pretrain(images, lr=0.1)": (
        pretrain(IMAGES, lr=0.1),
        "lr: no such setting. Did you mean optim__base_lr? `PROGRAM help` lists the keys",
    ),
    "pretrain(images, batch_size=64)": (
        pretrain(IMAGES, batch_size=64),
        "batch_size: no such setting. Did you mean global_batch_size? `PROGRAM help` lists the "
        "keys",
    ),
    'pretrain(images, device="cuda")': (
        pretrain(IMAGES, device="cuda"),
        "device: no such setting. A run uses the GPUs that it sees; CUDA_VISIBLE_DEVICES= hides "
        "them",
    ),
    'pretrain(images, optim={"lr": 0.1})': (
        pretrain(IMAGES, optim={"lr": 0.1}),
        "optim.lr: no such key. Did you mean 'base_lr'? `PROGRAM help optim` lists the keys there",
    ),
    'pretrain(images, optim="adamw")': (
        pretrain(IMAGES, optim="adamw"),
        "optim: 'adamw' is not a section; write optim.name=adamw",
    ),
    'pretrain(images, epochs="ten")': (
        pretrain(IMAGES, epochs="ten"),
        "epochs: 'ten' is not a whole number; write one in decimal digits, such as 100",
    ),
    'pretrain(images, method="SimCLR")': (
        pretrain(IMAGES, method="SimCLR"),
        "method.name: 'SimCLR' is not a method. Did you mean 'simclr'? `PROGRAM list methods` "
        "lists all; a method of your own is package.module",
    ),
    'pretrain(images, config="my.yaml", method__name="moco")': (
        pretrain(IMAGES, config="my.yaml", method__name="moco"),
        "my.yaml: method.name: moco would keep the learning rate, the views and the network that "
        "this file has for simclr; take a recipe of moco (`PROGRAM list configs`), or write one "
        "for your images: `PROGRAM inspect DATA --method moco --write my.yaml`",
    ),
    'pretrain(images, "simclr", method__name="moco")': (
        pretrain(IMAGES, "simclr", method__name="moco"),
        "method: 'simclr' is not the 'moco' of method__name; give one name",
    ),
    'pretrain(images, output="runs/mine", method__name="moco")': (
        lambda: ssl_pretrain.pretrain(IMAGES, output="runs/mine", method__name="moco"),
        "method: output runs/mine is of simclr, not of moco; leave out the method, or give "
        "another output",
    ),
    'pretrain(images, method="noconfig")': (
        pretrain(IMAGES, method="noconfig"),
        "method.name: noconfig has no class Config that extends "
        "ssl_pretrain.methods.base.MethodConfig; see CONTRIBUTING.md, `Add a method`",
    ),
    'pretrain(images, backbone="resnet-18")': (
        pretrain(IMAGES, backbone="resnet-18"),
        "backbone.name: 'resnet-18' is not a timm model. Did you mean 'resnet18' or 'resnet18d' "
        "or 'skresnet18'? `PROGRAM list backbones` lists all",
    ),
    "pretrain(images, backbone=MyNetwork)": (
        pretrain(IMAGES, backbone=nn.Identity),
        "backbone: <class 'torch.nn.modules.linear.Identity'> is of type type; give timm's name "
        "of a network, a torch module, or a function as package.module:function",
    ),
    "pretrain(images, backbone=nn.Conv2d(3, 8, 3))": (
        pretrain(IMAGES, backbone=nn.Conv2d(3, 8, 3)),
        "backbone.name: object:Conv2d returns shape (8, 14, 14) for an image, but one vector is "
        "needed; average over height and width in forward",
    ),
    'pretrain("photos", data__source="own:load")': (
        pretrain("photos", data__source="own:load"),
        "data.source: own:load('train') returns None; return the images",
    ),
    'load_backbone("notes.txt")': (
        lambda: ssl_pretrain.load_backbone("notes.txt"),
        "notes.txt: the network of these weights is unknown; give its timm name, as in "
        "backbone.name=resnet50",
    ),
    'load_backbone("notes.txt", backbone="resnet18")': (
        lambda: ssl_pretrain.load_backbone("notes.txt", backbone="resnet18"),
        "backbone.init: 'notes.txt' is not a safetensors or torch file: it begins with b'hello'; "
        "download it again",
    ),
    'load_backbone("runs/nope")': (
        lambda: ssl_pretrain.load_backbone("runs/nope"),
        "runs/nope: no such run folder; give the `output` of a run's config",
    ),
    "load_backbone(network)": (
        lambda: ssl_pretrain.load_backbone(nn.Identity()),
        "load_backbone: an object of type Identity is no run; give a run, its folder, or a file "
        "of weights",
    ),
    'load_backbone("runs/mine", device="gpu")': (
        lambda: ssl_pretrain.load_backbone("runs/mine", device="gpu"),
        "device: 'gpu' is not a device; give auto, cpu or cuda",
    ),
    "embed(network, images)": (
        lambda: ssl_pretrain.embed(nn.Conv2d(3, 3, 3), IMAGES),
        "embed: this backbone has no transform; give the one that load_backbone returned with it, "
        "as transform=",
    ),
    'embed("runs/mine", images[0])': (
        lambda: ssl_pretrain.embed("runs/mine", IMAGES[0]),
        "images has the shape (20, 20, 3), that of one color image; give the images as (n, "
        "height, width, 3)",
    ),
    'embed("runs/mine", image)': (
        lambda: ssl_pretrain.embed("runs/mine", Image.fromarray(IMAGES[0])),
        "images: is one image; give a list of images",
    ),
    'Run("photos")': (
        lambda: ssl_pretrain.Run("photos"),
        "photos: contains no run; give the output folder of one",
    ),
    'Run("runs/mine").evaluate("knnn")': (
        lambda: ssl_pretrain.Run("runs/mine").evaluate("knnn"),
        "evaluate: 'knnn' is not an evaluation; choose one of: knn, linear, attentive, fewshot, "
        "semi, finetune, retrieval, robustness, segmentation, spectrum, zeroshot, captions, sts, "
        "text_pairs",
    ),
}


@pytest.mark.parametrize("code", CALLS)
def test_a_mistake_in_python_is_answered_with_its_remedy(folder, monkeypatch, code):
    monkeypatch.chdir(folder)
    call, answer = CALLS[code]
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).replace(program.name(), "PROGRAM") == answer
    assert not Path("runs/new").exists()


def test_numbers_of_numpy_are_settings():
    tree = build_tree({"epochs": np.int64(3), "optim": {"base_lr": np.float32(0.5)}})
    assert tree == {"epochs": 3, "optim": {"base_lr": 0.5}}


def test_ranks_of_a_machine_print_a_mistake_once(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    outputs = []
    for rank in range(3):
        error_file = tmp_path / f"attempt_0/{rank}/error.json"  # as torchrun names it
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
        outputs.append(run_command(["train", "my.yaml", "optim.lr=0.1"]))
    answer = COMMANDS["train my.yaml optim.lr=0.1"].replace("PROGRAM", program.name())
    assert outputs == [(2, f"{answer}\n"), (2, ""), (2, "")]


def test_the_page_lists_the_mistakes_with_their_answers():
    page = PAGE.read_text()
    answers = [*COMMANDS.values(), *(answer for _, answer in CALLS.values())]
    texts = [
        answer.replace("PROGRAM", "ssl-pretrain").replace("FOLDER", "/data") for answer in answers
    ]
    missing = [text for text in texts if text not in page]
    assert not missing
