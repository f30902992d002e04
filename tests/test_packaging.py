"""Every kind of installation provides one package, and a clone runs without installation.

Each test that runs commands has a separate virtual environment. It sees the dependencies of the
current environment but not its editable installation, so nothing is found by accident. The packages
of extras are hidden, as for a user who has installed none.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(sysconfig.get_path("purelib"))
TOP_LEVEL = {"ssl_pretrain"}

# Modules of the extras of pyproject.toml that users choose.
OPTIONAL_MODULES = (
    *("wandb", "wandb_workspaces", "submitit", "tensorboard", "datasets", "ffcv", "faiss"),
    *("onnx", "onnxruntime", "onnxscript", "pycocotools"),
)

# At exit, every process of the environments reports the files that it has loaded twice.
REPORT_DUPLICATES = """
import atexit, collections, sys

def report():
    names = collections.defaultdict(list)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        is_ours = name.split(".")[0] in ("ssl_pretrain", "eval", "launch")
        if is_ours and name != "__main__" and not file.endswith("__init__.py"):
            names[__import__("os").path.realpath(file)].append(name)
    duplicates = [sorted(modules) for modules in names.values() if len(modules) > 1]
    if duplicates:
        print("LOADED TWICE:", duplicates, file=sys.stderr)

atexit.register(report)
"""

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys, importlib.resources
import ssl_pretrain, ssl_pretrain.eval, ssl_pretrain.launch
for module in pkgutil.walk_packages(ssl_pretrain.__path__, "ssl_pretrain."):
    if not module.name.endswith("__main__") and not module.name.endswith(".setup"):
        importlib.import_module(module.name)
    print("module", module.name)
print("package", ssl_pretrain.__file__)
print("eval", ssl_pretrain.eval.__file__)
configs = importlib.resources.files("ssl_pretrain") / "configs"
print("presets", len([entry for entry in configs.iterdir() if entry.name.endswith(".yaml")]))
"""


@dataclass
class Environment:
    """A Python interpreter with the dependencies, and the working folder of its commands."""

    python: Path
    folder: Path

    @property
    def site(self) -> Path:
        (path,) = self.python.parent.parent.glob("lib/python*/site-packages")
        return path

    def run(self, *command: str | Path) -> str:
        """Run Python and return its output, and check that it loads no file twice."""
        return self.complete(*command).stdout

    def complete(self, *command: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run Python to a successful end, and check that it loads no file twice.

        Args:
            command: Arguments of Python.
            changes: Environment variables with other values than in this process.
        """
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = (self.python, *command)
        result = subprocess.run(
            command, cwd=self.folder, env=variables | changes, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "LOADED TWICE" not in result.stderr, result.stderr
        return result


def create_environment(folder: Path, working_folder: Path) -> Environment:
    """Create a virtual environment with this one's dependencies and without this project."""
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    environment = Environment(folder / "bin" / "python", working_folder)
    (environment.site / "dependencies.pth").write_text(f"{SITE}\n")
    hide_extras = f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL_MODULES!r}))\n"
    (environment.site / "sitecustomize.py").write_text(hide_extras + REPORT_DUPLICATES)
    return environment


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """Copy the tracked files, links included, as a fresh clone would."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout, so the tracked files are unknown")
    for name in filter(None, listing.stdout.split("\0")):
        if name.startswith("docs/") or not (ROOT / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def build(folder: Path, kind: str, destination: Path) -> Path:
    """Call setuptools' build hook `kind`, such as build_wheel, and return the path of its file."""
    destination.mkdir()
    code = f"from setuptools.build_meta import {kind} as build; print(build({str(destination)!r}))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = destination.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    return build(clone, "build_wheel", tmp_path_factory.mktemp("wheel") / "dist")


def list_contents(wheel: Path) -> set[str]:
    """Return the names of the files in a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def list_expected_contents(clone: Path) -> set[str]:
    modules = [
        path.relative_to(clone)
        for folder in ("ssl_pretrain", "eval", "launch")
        for path in (clone / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".jinja", ".css", ".js", ".json", ".typed")
    ]
    presets = [path.relative_to(clone) for path in (clone / "configs").rglob("*.yaml")]
    names = {str(path) for path in [*modules, *presets]}
    return {name if name.startswith("ssl_pretrain/") else f"ssl_pretrain/{name}" for name in names}


def test_the_wheel_holds_every_module_and_preset_and_one_top_level_name(clone, wheel):
    assert list_contents(wheel) == list_expected_contents(clone)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("top_level.txt")]
        assert set(archive.read(name).decode().split()) == TOP_LEVEL


def test_the_wheel_requires_no_package_of_an_extra(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        lines = archive.read(name).decode().splitlines()
    entries = [line.split(": ")[1] for line in lines if line.startswith("Requires-Dist: ")]
    required = {re.split(r"[^\w-]", entry)[0] for entry in entries if "extra ==" not in entry}
    assert "torch" in required
    assert {name.replace("-", "_") for name in required} & {*OPTIONAL_MODULES, "faiss_gpu"} == set()


def test_the_wheel_built_from_the_sdist_is_the_same(clone, wheel, tmp_path):
    sdist = build(clone, "build_sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = [path for path in tmp_path.iterdir() if path.name.startswith("ssl_pretrain-")]
    rebuilt_wheel = build(folder, "build_wheel", tmp_path / "rebuilt")
    with zipfile.ZipFile(rebuilt_wheel) as second, zipfile.ZipFile(wheel) as first:
        assert list_contents(rebuilt_wheel) == list_contents(wheel)
        assert all(second.read(name) == first.read(name) for name in list_contents(wheel))


@pytest.mark.full
def test_a_checkout_without_symbolic_links_runs_and_builds_the_same_wheel(clone, wheel, tmp_path):
    folder = tmp_path / "repository"
    shutil.copytree(clone, folder, symlinks=True)
    for name in ("eval", "launch", "configs"):
        (folder / "ssl_pretrain" / name).unlink()
    assert list_contents(build(folder, "build_wheel", tmp_path / "dist")) == list_contents(wheel)
    environment = create_environment(tmp_path / "venv", folder)
    assert "usage: python -m ssl_pretrain.eval.knn" in environment.run("-m", "eval.knn", "--help")


@pytest.mark.full
def test_a_clone_that_is_not_installed_runs_as_documented(clone, tmp_path):
    environment = create_environment(tmp_path / "venv", clone)
    assert "usage" in environment.run("launch/pretrain.py", "--help")
    assert "usage" in environment.run("-m", "eval.knn", "--help")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "1")
    assert "usage" in environment.run(*torchrun, "-m", "ssl_pretrain.train", "--help")
    assert_complete(environment.run("-c", IMPORT_EVERYTHING), clone, clone)


def install(wheel: Path, environment: Environment) -> None:
    """Unpack a wheel. For a pure-Python wheel this is all that an installer does."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(environment.site)


@pytest.fixture
def users_folder(tmp_path) -> Path:
    """Write a folder where a user has packages named eval and launch."""
    for name in ("eval", "launch"):
        (tmp_path / "user" / name).mkdir(parents=True)
        text = f"raise ImportError('this is the user\\'s own {name}')\n"
        (tmp_path / "user" / name / "__init__.py").write_text(text)
    return tmp_path / "user"


@pytest.mark.parametrize(
    "kind", ["build_wheel", pytest.param("build_editable", marks=pytest.mark.full)]
)
def test_an_installed_package_runs_beside_the_users_own_eval_and_launch(
    clone, users_folder, tmp_path, kind
):
    environment = create_environment(tmp_path / "venv", users_folder)
    install(build(clone, kind, tmp_path / "dist"), environment)
    assert "usage" in environment.run("-m", "ssl_pretrain.launch.pretrain", "--help")
    assert "usage" in environment.run("-m", "ssl_pretrain.eval.knn", "--help")
    root = clone if kind == "build_editable" else environment.site
    assert_complete(environment.run("-c", IMPORT_EVERYTHING), clone, root)


def assert_complete(output: str, clone: Path, root: Path) -> None:
    """Compare the output of IMPORT_EVERYTHING with the files of the clone.

    The package must lie below `root`.
    """
    modules = {line.split()[1] for line in output.splitlines() if line.startswith("module ")}
    names = {name for name in list_expected_contents(clone) if name.endswith(".py")}
    expected = {name.removesuffix(".py").replace("/", ".") for name in names}
    expected = {name.removesuffix(".__init__") for name in expected} - {"ssl_pretrain"}
    assert modules - {"ssl_pretrain.configs", "ssl_pretrain.configs.sweeps"} == expected
    lines = dict(line.split(" ", 1) for line in output.splitlines())
    assert Path(lines["package"]).resolve().is_relative_to(root.resolve())
    assert Path(lines["eval"]).resolve().is_relative_to(root.resolve())
    assert int(lines["presets"]) == len(list((clone / "configs").glob("*.yaml")))


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_wheel_trains_and_evaluates_in_an_empty_folder(wheel, tmp_path):
    (tmp_path / "empty").mkdir()
    environment = create_environment(tmp_path / "venv", tmp_path / "empty")
    install(wheel, environment)
    environment.run("-m", "ssl_pretrain.cli", "train", "simclr_digits", "epochs=1", "output=run")
    assert "pretrained" in environment.run("-m", "ssl_pretrain.cli", "knn", "run")
    environment.run("-m", "ssl_pretrain.cli", "report", "run")
    assert (tmp_path / "empty" / "run" / "report.html").stat().st_size > 0


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_wheel_trains_from_a_beton_with_threads_without_ffcv_and_a_compiler(wheel, tmp_path):
    images = tiny.write_images(tmp_path / "images")
    (tmp_path / "tiny.yaml").write_text(tiny.YAML)
    environment = create_environment(tmp_path / "venv", tmp_path)
    install(wheel, environment)
    command, no_programs = ("-m", "ssl_pretrain.cli"), {"PATH": str(tmp_path / "no programs")}
    environment.complete(*command, "beton", "write", images, "train.beton", **no_programs)
    settings = ("data.root=train.beton", "data.num_workers=2", "epochs=1", "output=run")
    result = environment.complete(*command, "train", "tiny.yaml", *settings, **no_programs)
    assert "\ndata.loader: threads: train.beton is a .beton\n" in result.stderr
    assert "finished: 3 of 3 steps" in result.stdout + result.stderr
