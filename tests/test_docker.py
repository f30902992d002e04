"""The list of system packages, and docker/job.sh with stand-ins for SLURM's programs."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_sed_lists_the_packages_that_setup_installs():
    sed_result = run("sed", "s/#.*//", "docker/system-packages.txt", check=True)
    setup_result = run("bash", "-c", "source docker/setup.sh && system_packages", check=True)
    assert sed_result.stdout.split() == setup_result.stdout.split()


@pytest.fixture
def cluster(tmp_path):
    """Return a folder of stand-ins for srun and scontrol, and a function that submits a job."""
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\nprintf 'node7\\nnode8\\n'\n")
    for program in ("srun", "scontrol"):
        (tmp_path / program).chmod(0o755)
    for image in ("x.sif", "x.sqsh"):
        (tmp_path / image).touch()

    def submit(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_ID": "41",
            **variables,
        }
        return run("bash", "docker/job.sh", *arguments, env=environment)

    return tmp_path, submit


@pytest.mark.parametrize(
    ("image", "command"),
    [
        ("x.sif", "apptainer exec --nv --bind /a:/b {image}"),
        ("x.sqsh", "--container-image={image} --container-mounts=/a:/b"),
    ],
)
def test_the_job_starts_one_rank_per_task_in_either_image(cluster, image, command):
    folder, submit = cluster
    result = submit("configs/x.yaml", "epochs=3", IMAGE=str(folder / image), MOUNTS="/a:/b")
    assert result.returncode == 0, result.stderr
    expected = command.format(image=folder / image).split()
    assert result.stdout.split("bash\n-c\n")[0].split() == expected
    assert result.stdout.endswith('ssl_pretrain.train "$@"\nrank\nconfigs/x.yaml\nepochs=3\n')
    for variable in ("RANK=$SLURM_PROCID", "LOCAL_RANK=$SLURM_LOCALID", "WORLD_SIZE=$SLURM_NTASKS"):
        assert variable in result.stdout


def test_a_job_without_a_config_ends_with_the_usage(cluster):
    folder, submit = cluster
    usage = "error: no config; usage: sbatch docker/job.sh CONFIG [key=value ...]\n"
    assert submit(IMAGE=str(folder / "x.sif")).stderr == usage


def test_a_job_without_an_image_ends_with_an_error(cluster):
    _, submit = cluster
    message = (
        "error: no image at /nowhere.sif; set IMAGE to its path, or build it (docker/README.md)\n"
    )
    assert submit("x.yaml", IMAGE="/nowhere.sif").stderr == message
