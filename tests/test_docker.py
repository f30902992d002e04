"""The three set-ups, by make, Docker and Apptainer, say the same: one list of system packages, one of Python packages, one base."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = {
    name: (ROOT / "docker" / name).read_text()
    for name in ("Dockerfile", "ssl_pretrain.def", "setup.sh", "job.sh", "README.md")
}
CODE = {
    name: "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for name, text in TEXT.items()
}
IMAGES = ("Dockerfile", "ssl_pretrain.def")


@pytest.mark.parametrize("name", IMAGES)
def test_system_packages_come_from_the_one_list(name):
    (installed,) = re.findall(
        r"apt-get install -y --no-install-recommends (.*?)(?: \\|$)", CODE[name], re.MULTILINE
    )
    by_hand, _, listed = installed.partition(" $(")
    assert by_hand == "g++ git make"  # what make itself needs, as docs/install.md says
    assert re.fullmatch(r"sed 's/#\.\*//' \S*system-packages\.txt\)", listed)
    assert "docker/system-packages.txt" in CODE["setup.sh"]


def test_the_lists_sed_gives_the_packages_that_setup_installs():
    listed = subprocess.run(
        ["sed", "s/#.*//", "docker/system-packages.txt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    command = ["bash", "-c", "source docker/setup.sh && system_packages"]
    assert (
        listed.stdout.split()
        == subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )


@pytest.mark.parametrize("name", IMAGES)
def test_python_packages_come_by_make_alone(name):
    assert (
        re.findall(r"\bmake (\S+)", CODE[name])[:2] == ["$(sed", ".venv/.ffcv"]
        and "make env" in CODE[name]
    )
    assert "test ! -s .venv/.ffcv" in CODE[name]  # an image without FFCV is refused
    assert not re.search(r"\b(pip|uv|conda) install\b|https?://", CODE[name])


def test_both_images_have_one_base_of_an_exact_version():
    docker = re.search(r"^ARG BASE=(\S+)$", CODE["Dockerfile"], re.MULTILINE)[1]
    assert docker == re.search(r"^From: (\S+)$", CODE["ssl_pretrain.def"], re.MULTILINE)[1]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", docker)


def test_the_image_runs_as_a_user():
    lines = CODE["Dockerfile"].splitlines()
    last = [line for line in lines if line.startswith("USER")][-1]
    assert last == "USER trainer" and lines.index(last) < min(
        lines.index(line) for line in lines if line.startswith(("RUN make", "CMD"))
    )
    assert all(
        "--chown=trainer" in line for line in lines[lines.index(last) :] if line.startswith("COPY")
    )


@pytest.mark.parametrize("name", ["Dockerfile", "ssl_pretrain.def", "job.sh"])
def test_what_was_not_built_says_so(name):
    assert re.search(r"[Nn]ot (built|run) here", TEXT[name])
    assert re.search(rf"\[{re.escape(name)}\].*not (built|run) here", TEXT["README.md"])


@pytest.fixture
def cluster(tmp_path):
    """srun and scontrol that say how they were called; the image is there."""
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\nprintf 'node7\\nnode8\\n'\n")
    for program in ("srun", "scontrol"):
        (tmp_path / program).chmod(0o755)
    for image in ("x.sif", "x.sqsh"):
        (tmp_path / image).touch()

    def submit(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        given = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_ID": "41",
            **environment,
        }
        return subprocess.run(
            ["bash", "docker/job.sh", *arguments],
            cwd=ROOT,
            env=given,
            capture_output=True,
            text=True,
            check=False,
        )

    return tmp_path, submit


@pytest.mark.parametrize(
    ("image", "how"),
    [
        ("x.sif", "apptainer exec --nv --bind /a:/b {image}"),
        ("x.sqsh", "--container-image={image} --container-mounts=/a:/b"),
    ],
)
def test_the_job_starts_a_rank_a_task_in_either_image(cluster, image, how):
    folder, submit = cluster
    done = submit("configs/x.yaml", "epochs=3", IMAGE=str(folder / image), MOUNTS="/a:/b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("bash\n-c\n")[0].split() == how.format(image=folder / image).split()
    assert done.stdout.endswith('ssl_pretrain.train "$@"\nrank\nconfigs/x.yaml\nepochs=3\n')
    for variable in ("RANK=$SLURM_PROCID", "LOCAL_RANK=$SLURM_LOCALID", "WORLD_SIZE=$SLURM_NTASKS"):
        assert variable in done.stdout


def test_a_job_without_config_or_image_says_so(cluster):
    folder, submit = cluster
    assert (
        submit(IMAGE=str(folder / "x.sif")).stderr
        == "error: no config; usage: sbatch docker/job.sh CONFIG [key=value ...]\n"
    )
    assert (
        submit("x.yaml", IMAGE="/nowhere.sif").stderr
        == "error: no image at /nowhere.sif; IMAGE names it, docker/README.md makes it\n"
    )
