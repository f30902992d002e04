"""The folder listing is the data flow: each file imports only what its line here says, and no text names one machine.

The table is the import graph of the project. A new file gets a line here; a line that grows says so in its commit.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# file -> what of this project it may import; a folder stands for all its files. `*`: everything.
MAY_IMPORT = {
    "ssl_pretrain/disk.py": "",
    "ssl_pretrain/watchdog.py": "restarts",
    "ssl_pretrain/stop_signals.py": "",
    "ssl_pretrain/distributed.py": "stop_signals watchdog",
    "ssl_pretrain/jit.py": "",
    "ssl_pretrain/draws.py": "jit",
    "ssl_pretrain/schedules.py": "",
    "ssl_pretrain/schema.py": "",
    "ssl_pretrain/data/images.py": "",
    "ssl_pretrain/data/listing.py": "data/images",
    "ssl_pretrain/data/cifar10.py": "",
    "ssl_pretrain/data/file_lists.py": "data/listing",
    "ssl_pretrain/data/splits.py": "data/file_lists data/listing",
    "ssl_pretrain/data/labels.py": "data/file_lists data/listing data/splits",
    "ssl_pretrain/data/beton_file.py": "",
    "ssl_pretrain/data/sources.py": "schema data/beton_file data/cifar10 data/file_lists data/images data/labels data/listing data/splits draws",
    "ssl_pretrain/data/compiled.py": "data/beton_file views draws jit",
    "ssl_pretrain/data/progress.py": "",
    "ssl_pretrain/data/beton_writer.py": "data/beton_file data/compiled data/images data/progress data/sources",
    "ssl_pretrain/data/beton.py": "schema data/beton_file data/beton_writer data/compiled data/progress data/sources",
    "ssl_pretrain/data/order.py": "draws",
    "ssl_pretrain/data/replacement.py": "data/order",
    "ssl_pretrain/data/workers.py": "data/sources data/images data/order data/replacement",
    "ssl_pretrain/data/threads.py": "data/beton_file data/compiled data/order data/replacement data/workers views",
    "ssl_pretrain/data/device_cache.py": "data/images data/order data/replacement data/sources data/workers views",
    "ssl_pretrain/data/loader.py": "data/order data/compiled data/device_cache data/sources data/threads data/workers views distributed",
    "ssl_pretrain/data/preflight.py": "data/loader distributed",
    "ssl_pretrain/data/inspect.py": "schema data/sources data/images data/listing data/progress",
    "ssl_pretrain/views/recipe.py": "",
    "ssl_pretrain/views/resize.py": "jit",
    "ssl_pretrain/views/upload.py": "",
    "ssl_pretrain/views/crops.py": "views/recipe views/resize views/upload draws jit",
    "ssl_pretrain/views/colour_cpu.py": "jit",
    "ssl_pretrain/views/describe.py": "views/colour views/crops views/recipe",
    "ssl_pretrain/views/color_triton.py": "views/upload",
    "ssl_pretrain/views/colour.py": "views/color_triton views/colour_cpu views/recipe views/upload draws",
    "ssl_pretrain/torchvision_names.py": "",
    "ssl_pretrain/published.py": "torchvision_names",
    "ssl_pretrain/timm_alone.py": "",
    "ssl_pretrain/backbones.py": "published schema timm_alone",
    "ssl_pretrain/heads.py": "",
    "ssl_pretrain/momentum.py": "distributed schedules timm_alone",
    "ssl_pretrain/losses/*.py": "losses/tiles losses/tiles_triton distributed",
    "ssl_pretrain/methods/*.py": "methods/base backbones heads momentum losses distributed schedules",
    "ssl_pretrain/larc.py": "distributed",
    "ssl_pretrain/optim.py": "larc schedules schema distributed",
    "ssl_pretrain/batch_norm.py": "distributed",
    "ssl_pretrain/blocks.py": "batch_norm timm_alone",
    "ssl_pretrain/parallel.py": "backbones batch_norm blocks schema distributed",
    "ssl_pretrain/step.py": "parallel batch_norm optim distributed draws",
    "ssl_pretrain/memory.py": "distributed",
    "ssl_pretrain/lock.py": "disk distributed",
    "ssl_pretrain/restarts.py": "",
    "ssl_pretrain/guard.py": "schema disk distributed",
    "ssl_pretrain/provenance.py": "distributed",
    "ssl_pretrain/agreement.py": "distributed provenance",
    "ssl_pretrain/manifest.py": "disk",
    "ssl_pretrain/checkpoint.py": "backbones published disk distributed manifest provenance restarts watchdog",
    "ssl_pretrain/measures.py": "",
    "ssl_pretrain/alarms.py": "",
    "ssl_pretrain/health.py": "alarms measures momentum distributed",
    "ssl_pretrain/communication.py": "backbones batch_norm hardware parallel",
    "ssl_pretrain/trace.py": "",
    "ssl_pretrain/hardware.py": "trace",
    "ssl_pretrain/pictures.py": "",
    "ssl_pretrain/probe.py": "",
    "ssl_pretrain/online.py": "distributed pictures probe",
    "ssl_pretrain/curves.py": "",
    "ssl_pretrain/flops.py": "",
    "ssl_pretrain/console.py": "",
    "ssl_pretrain/wandb_file.py": "",
    "ssl_pretrain/wandb_process.py": "curves wandb_file wandb_run",
    "ssl_pretrain/wandb_run.py": "disk",
    "ssl_pretrain/records.py": "disk distributed",
    "ssl_pretrain/log.py": "schema console disk records pictures wandb_run distributed",
    "ssl_pretrain/config.py": "*",
    "ssl_pretrain/estimate.py": "*",
    "ssl_pretrain/plan.py": "*",
    "ssl_pretrain/scaling.py": "communication config estimate hardware memory",
    "ssl_pretrain/calibrate.py": "schema backbones data distributed estimate hardware memory views",
    "ssl_pretrain/train.py": "*",
    "ssl_pretrain/replay.py": "*",
    "eval/*.py": "eval schema backbones batch_norm data views draws jit schedules checkpoint curves disk health memory online config console distributed restarts",
    "eval/detection/*.py": "eval schema backbones data batch_norm draws distributed",
    "launch/*.py": "*",
}
# what even `*` leaves out: nothing imports what comes after it
AFTER = {
    "ssl_pretrain/config.py": {"ssl_pretrain/estimate.py", "ssl_pretrain/plan.py", "ssl_pretrain/train.py", "ssl_pretrain/replay.py", "eval/*.py", "launch/*.py"},
    "ssl_pretrain/estimate.py": {"ssl_pretrain/plan.py", "ssl_pretrain/train.py", "ssl_pretrain/replay.py", "eval/*.py", "launch/*.py"},
    "ssl_pretrain/plan.py": {"ssl_pretrain/train.py", "ssl_pretrain/replay.py", "eval/*.py", "launch/*.py"},
    "ssl_pretrain/train.py": {"ssl_pretrain/replay.py", "launch/*.py"},
}

# outside packages that only some files touch; the optional ones only inside a function, so that a missing one is a message
ONLY_IN = {
    "torch.distributed": ("ssl_pretrain/distributed.py", "ssl_pretrain/parallel.py", "ssl_pretrain/checkpoint.py", "launch/torchrun.py"),
    "wandb": ("ssl_pretrain/wandb_process.py", "ssl_pretrain/wandb_file.py", "launch/dashboard.py"),
    "wandb_workspaces": ("launch/dashboard.py",),
    "ffcv": ("ssl_pretrain/data/compiled.py",),
    "faiss": ("ssl_pretrain/online.py", "eval/knn.py"),
    "onnx": ("eval/onnx_model.py",),
    "onnxruntime": ("eval/onnx_model.py",),
    "onnxscript": ("eval/onnx_model.py",),
    "submitit": ("launch/slurm.py",),
    "pycocotools": ("eval/detection/metrics.py", "eval/detection/training.py"),
}
OPTIONAL = ("wandb", "wandb_workspaces", "ffcv", "faiss", "submitit", "pycocotools", "onnx", "onnxruntime", "onnxscript")

SAYS_NOTHING = {"utils", "util", "common", "misc", "helpers", "helper", "stuff"}
WITH_A_FUNCTION = {"ssl_pretrain/methods/__init__.py"}  # finds a method's file by its name


def source_files(root: Path) -> list[Path]:
    return sorted(path for folder in ("ssl_pretrain", "eval", "launch") for path in (root / folder).rglob("*.py"))


def imports(path: Path, root: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, inside a function) of every import; of `from a import b`, the name a.b."""

    def walk(node: ast.AST, in_function: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, in_function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = list(path.relative_to(root).parts[: -child.level]) if child.level else []
                base = ".".join(package + ([child.module] if child.module else []))
                yield from ((f"{base}.{alias.name}", child.lineno, in_function) for alias in child.names)
            elif isinstance(child, ast.Attribute) and ast.unparse(child) == "torch.distributed":
                yield "torch.distributed", child.lineno, True
            else:
                yield from walk(child, in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return walk(ast.parse(path.read_text()), False)


def file_of(name: str, root: Path) -> str | None:
    """The file of this project that a dotted name means, `ssl_pretrain/draws.py`; None for a name from outside."""
    parts = name.split(".")
    if parts[0] not in ("ssl_pretrain", "eval", "launch"):
        return None
    for count in range(len(parts), 0, -1):
        path = root.joinpath(*parts[:count])
        if path.with_suffix(".py").is_file():
            return str(path.with_suffix(".py").relative_to(root))
        if path.is_dir():
            return str(path.relative_to(root) / "__init__.py")
    return f"{'/'.join(parts)}.py"


def line_of(file: str) -> str | None:
    """The file's line in the table."""
    if file.endswith("/__init__.py"):
        return file
    return next((line for line in (file, f"{file.rpartition('/')[0]}/*.py") if line in MAY_IMPORT), None)


def allowed(file: str, target: str) -> bool:
    if target.endswith("/__init__.py") and target.rpartition("/")[0] in ("ssl_pretrain", file.rpartition("/")[0]):
        return True  # the package a file is in
    line = line_of(file)
    if file.endswith("/__init__.py"):
        return target.startswith(file.removesuffix("__init__.py"))  # a package's front door opens on its own rooms
    if MAY_IMPORT[line] == "*":
        return line_of(target) not in AFTER.get(line, set())
    names = [name if name.startswith("eval") else f"ssl_pretrain/{name}" for name in MAY_IMPORT[line].split()]
    return any(target == f"{name}.py" or target.startswith(f"{name}/") for name in names)


def wrong_name(file: str) -> Iterator[str]:
    if SAYS_NOTHING & {*file.removesuffix(".py").split("/")}:
        yield f"{file}: the name says nothing about what is in it; name it by its part in the data flow"
    elif line_of(file) is None:
        yield f"{file}: has no line in tests/test_layout.py; add one that says what it may import"


def wrong_init(file: str, root: Path) -> Iterator[str]:
    if not file.endswith("/__init__.py") or file in WITH_A_FUNCTION:
        return
    for node in ast.parse((root / file).read_text()).body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)) and not is_text(node):
            yield f"{file}:{node.lineno}: an __init__ holds a docstring and imports, nothing else"


def wrong_imports(file: str, root: Path) -> Iterator[str]:
    for name, line, in_function in imports(root / file, root):
        target = file_of(name, root)
        if target not in (None, file) and not allowed(file, target):
            may = MAY_IMPORT.get(line_of(file), "its own folder") or "nothing of this project"
            yield f"{file}:{line}: imports {name}; its line allows: {may}"
        package = next((package for package in ONLY_IN if f"{name}.".startswith(f"{package}.")), None)
        if package and file not in ONLY_IN[package]:
            yield f"{file}:{line}: imports {package}; only these do: {', '.join(ONLY_IN[package])}"
        elif package in OPTIONAL and not in_function:
            yield f"{file}:{line}: imports {package} at the top; import it where it is used"


def violations(root: Path) -> list[str]:
    files = [str(path.relative_to(root)) for path in source_files(root)]
    found = [message for file in files for message in wrong_name(file)]
    return found or [message for file in files for message in [*wrong_init(file, root), *wrong_imports(file, root)]]


def is_text(node: ast.stmt) -> bool:
    """A docstring, or a plain assignment of a constant such as __version__ or __all__."""
    value = getattr(node, "value", None)
    if isinstance(node, ast.Expr):
        return isinstance(value, ast.Constant)
    return isinstance(node, ast.Assign) and isinstance(value, (ast.Constant, ast.List, ast.Tuple))


def test_each_file_imports_only_what_its_line_says():
    assert not (found := violations(ROOT)), "\n" + "\n".join(found)


def test_every_line_of_a_folder_is_a_folder():
    assert all((ROOT / line).parent.is_dir() for line in MAY_IMPORT)


METHOD, OPTIM = "ssl_pretrain/methods/x.py", "ssl_pretrain/optim.py"
PLANTED = {  # file, its text, what the message says
    "a method that reads data": (
        METHOD,
        "from ssl_pretrain.data import loader",
        "imports ssl_pretrain.data.loader; its line allows: methods",
    ),
    "a method that imports its sibling": (METHOD, "from . import simclr", "imports ssl_pretrain.methods.simclr; its line"),
    "a method that takes its sibling's class": (METHOD, "from .simclr import SimCLR", "imports ssl_pretrain.methods.simclr.SimCLR;"),
    "inside a function too": (
        "ssl_pretrain/draws.py",
        "def f():\n    import ssl_pretrain.config",
        "draws.py:2: imports ssl_pretrain.config;",
    ),
    "an evaluation that trains": ("eval/x.py", "from ssl_pretrain import train", "eval/x.py:1: imports ssl_pretrain.train;"),
    "a config that imports the loop": ("ssl_pretrain/config.py", "from ssl_pretrain import train", "imports ssl_pretrain.train;"),
    "a collective elsewhere": (OPTIM, "import torch.distributed as dist", "imports torch.distributed; only these do"),
    "a collective by attribute": (OPTIM, "import torch\ntorch.distributed.barrier()", "optim.py:2: imports torch.distributed;"),
    "wandb at the top": ("ssl_pretrain/wandb_file.py", "import wandb", "imports wandb at the top; import it where it is used"),
    "faiss elsewhere": ("eval/linear.py", "def f():\n    import faiss.contrib", "imports faiss; only these do"),
    "a name that says nothing": ("ssl_pretrain/data/utils.py", "", "the name says nothing"),
    "a file without a line": ("ssl_pretrain/new.py", "", "has no line in tests/test_layout.py"),
    "logic in an __init__": ("ssl_pretrain/views/__init__.py", "def f(): ...", "an __init__ holds a docstring and imports"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_check_finds_what_it_is_for(name, tmp_path):
    file, text, message = PLANTED[name]
    for package in ("ssl_pretrain", "ssl_pretrain/data", "ssl_pretrain/views", "ssl_pretrain/methods"):
        (tmp_path / package).mkdir(parents=True, exist_ok=True)
        (tmp_path / package / "__init__.py").write_text('"""Nothing."""\n')
    for other in ("ssl_pretrain/data/loader.py", "ssl_pretrain/methods/simclr.py", "ssl_pretrain/train.py", "ssl_pretrain/config.py"):
        (tmp_path / other).write_text("")
    assert violations(tmp_path) == []
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (found,) = violations(tmp_path)
    assert message in found


# spelled in pieces, so that this file passes its own check
FOREIGN = {
    "a package host": re.compile(r"https?://\S*(/simple|/packages/|\.whl|\.deb)|index-" + r"url|py" + r"pi\.org|python" + r"hosted"),
    "a path of one machine": re.compile(r"(?<![\w.$}~])/" + r"(work|root|home/\w+|Users/\w+)/"),
}


def foreign(text: str) -> list[str]:
    """`line number: names what: the line`, of every line that names something which is not everywhere."""
    lines = list(enumerate(text.splitlines(), 1))
    return [
        f"{number}: names {what}: {line.strip()[:120]}"
        for what, pattern in FOREIGN.items()
        for number, line in lines
        if pattern.search(line)
    ]


def test_no_file_names_a_package_host_or_a_path_of_one_machine():
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: no list of the files that count")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:
            found += [f"{name}:{line}" for line in foreign(content.decode(errors="replace"))]
    assert not found, "\n" + "\n".join(found)


def test_the_scan_finds_what_it_is_for():
    for text in ("--extra-index-" + "url x", "http://host" + "/simple", "see '/ro" + "ot/.cache'", "cd /wo" + "rk/main"):
        assert foreign(f"first\n{text}\n")[0].startswith("2: names ")
    assert not foreign("data.root=/data/imagenet\nhttps://github.com/a/b/tree/work/x\nruns/work/x\n")
