"""launch/pretrain.py as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from ssl_pretrain import config
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.launch import local, pretrain, slurm, slurm_submit, sweep
from ssl_pretrain.train import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "evaluations",
    [["knn", "report"], pytest.param(["knn", "linear", "report"], marks=pytest.mark.full)],
)
def test_it_trains_evaluates_and_reports(tmp_path, evaluations):
    path = tiny.config(tmp_path)
    arguments = [
        str(path),
        "epochs=1",
        "launch.ranks=2",
        f"evaluation.at_end=[{','.join(evaluations)}]",
    ]
    result = subprocess.run(
        [sys.executable, "launch/pretrain.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    run = tmp_path / "run"
    assert (
        json.loads((run / "checkpoints" / "step_00000003" / "manifest.json").read_text())[
            "machine"
        ]["world_size"]
        == 2
    )
    assert {f"{name}.json" for name in evaluations[:-1]} <= {
        file.name for file in (run / "eval").iterdir()
    }
    assert (run / "report.html").exists()
    stages = [line for line in result.stdout.splitlines() if line.startswith("--- ")]
    assert stages[: 1 + len(evaluations)] == [
        f"--- {name}" for name in ["pretraining", *evaluations]
    ]


def test_hosts_print_the_exact_lines(tmp_path, capsys):
    path = tiny.config(tmp_path)
    assert pretrain.main([str(path), "launch.hosts=a,b", "launch.ranks=4", "seed=3"]) == 0
    meet = "env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun "
    meet += "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:29500 --rdzv-id run --rdzv-conf is_host={} --local-addr {}"
    train = (
        f"--max-restarts 3 --nproc-per-node 4 -m ssl_pretrain.train {path} launch.ranks=4 seed=3"
    )
    assert capsys.readouterr().out.splitlines() == [
        "# on a",
        f"{meet.format(1, 'a')} {train}",
        "# on b",
        f"{meet.format(0, 'b')} {train}",
    ]


@pytest.mark.parametrize("hosts", ["a\ntouch taken", "a,b,a", ",", "a,-b", "$(id)"])
def test_hosts_that_would_be_commands_or_no_host_are_refused(tmp_path, capsys, hosts):
    """The lines are pasted into a shell."""
    assert pretrain.main([str(tiny.config(tmp_path)), f"launch.hosts={hosts}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: launch.hosts: ")
    assert err.endswith(
        f" of {hosts!r} is not the name or address of one more host; give such as a,b,10.0.0.3\n"
    )


def test_a_sweep_refuses_hosts_and_evaluations_before_its_first_run(tmp_path, capsys):
    path = tiny.config(tmp_path)
    assert sweep.main([str(path), "seed=0,1", "launch.hosts=a"]) == 2
    assert capsys.readouterr().err == (
        "error: launch.hosts: 'a', and these runs follow each other on this machine; "
        "leave it out, or start each run with launch/pretrain.py\n"
    )
    assert sweep.main([str(path), "seed=0,1", "evaluation.at_end=[knn,nearest]"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: evaluation.at_end: 'nearest' is not an evaluation; choose among: knn, "
    )


def test_a_plan_trains_nothing(tmp_path, capsys):
    path = tiny.config(tmp_path)
    assert pretrain.main([str(path), "--plan", "launch.ranks=2"]) == 0
    out = capsys.readouterr().out
    assert "embeddings per loss: 48 (2 views x 24 images); negatives per anchor: 46" in out
    assert (
        "steps per epoch: 3 (78 images, the last incomplete batch dropped); 24 in 8 epochs" in out
    )
    assert not (tmp_path / "run").exists()


def test_mistakes_are_one_line(tmp_path, capsys):
    path = tiny.config(tmp_path)
    assert pretrain.main([str(path), "evaluation.at_end=[knnn]"]) == 2
    assert (
        capsys.readouterr().err
        == "error: evaluation.at_end: 'knnn' is not an evaluation; choose among: knn, linear, spectrum, retrieval, robustness, semi, finetune, export, report\n"
    )
    assert pretrain.main([str(path), "launch.ranks=5"]) == 2
    assert (
        capsys.readouterr().err
        == "error: global_batch_size: 24 does not divide over 5 ranks; the nearest that do are 20 and 25\n"
    )


def test_one_rank_needs_no_torchrun(tmp_path):
    path = str(tiny.config(tmp_path))
    assert local.train_command(path, ["seed=1"], 1) == [
        sys.executable,
        "-m",
        "ssl_pretrain.train",
        path,
        "seed=1",
    ]
    assert "--standalone" in local.train_command(path, [], 2)
    assert local.num_ranks(config.load(path, ["launch.ranks=3"])) == 3


def test_a_sweep_is_the_product_of_its_values(tmp_path, capsys):
    path = tiny.config(tmp_path)
    arguments = [
        str(path),
        "seed=0,1",
        "optim.base_lr=0.1,0.2",
        "method.projector_dims=[16,8]",
        f"output={tmp_path / 'sweep'}",
        "launch.cluster=local",
    ]
    assert sweep.main([*arguments, "--list"]) == 0
    names = ("seed=0,base_lr=0.1", "seed=0,base_lr=0.2", "seed=1,base_lr=0.1", "seed=1,base_lr=0.2")
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/sweep/{name}" for name in names]
    assert sweep.combinations(str(path), arguments[1:])[3][:3] == [
        "seed=1",
        "optim.base_lr=0.2",
        "method.projector_dims=[16,8]",
    ]
    assert sweep.main([str(path), "seed"]) == 2
    assert (
        capsys.readouterr().err
        == "error: 'seed': an override is key=value, such as optim.base_lr=0.2,0.3\n"
    )


def test_slurm_is_taken_only_where_its_controller_answers(tmp_path, monkeypatch):
    """A machine may have the commands and no cluster."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm.is_available()
    for status, taken in ((1, False), (0, True)):
        for command in ("sbatch", "scontrol"):
            (tmp_path / command).write_text(f"#!/bin/sh\nexit {status}\n")
            (tmp_path / command).chmod(0o755)
        assert slurm.is_available() is taken
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not slurm.is_available()


def test_what_is_asked_of_slurm(tmp_path):
    settings = [
        "launch.nodes=2",
        "launch.gpus_per_node=8",
        "launch.partition=gpu",
        "launch.hours=1.5",
        "data.num_workers=12",
        "launch.memory_gb=900",
    ]
    run = config.load(tiny.config(tmp_path), settings)
    asked = slurm.request(run)
    assert (
        slurm.num_ranks(run) == 16
        and asked["nodes"] == 2
        and asked["tasks_per_node"] == 8
        and asked["cpus_per_task"] == 12
    )
    assert (
        asked["timeout_min"] == 90 and asked["slurm_partition"] == "gpu" and asked["mem_gb"] == 900
    )
    assert asked["slurm_additional_parameters"] == {
        "open_mode": "append",
        "requeue": True,
        "gpus_per_node": 8,
    }
    settings += ["launch.requeue=false", "launch.chain=3"]
    once = config.load(tmp_path / "tiny.yaml", settings)
    assert slurm.request(once)["slurm_additional_parameters"] == {
        "open_mode": "append",
        "no_requeue": True,
        "gpus_per_node": 8,
    }
    with pytest.raises(config.ConfigError) as error:
        slurm.request(config.load(tiny.config(tmp_path / "b"), ["launch.hours=0.01"]))
    assert (
        str(error.value)
        == "launch.signal_seconds: 120 leaves nothing of launch.hours: 0.01; give less"
    )


def test_a_plan_shows_what_is_asked_of_slurm(tmp_path, capsys):
    path = tiny.config(tmp_path)
    asked = [
        "launch.cluster=slurm",
        "launch.nodes=2",
        "launch.gpus_per_node=4",
        "launch.hours=1.5",
        "data.num_workers=12",
        "launch.memory_gb=900",
    ]
    assert (
        pretrain.main(
            [
                str(path),
                "--plan",
                *asked,
                "launch.partition=gpu",
                "launch.chain=3",
                "evaluation.at_end=[knn]",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "SLURM job: 3 x pretraining, one after the other (run): 2 nodes x 4 tasks = 8 ranks, 12 CPUs per task, 4 GPUs per node, 900 GB per node, "
        "90 min, SIGUSR2 120 s before the limit, requeued until the run has ended, partition gpu",
        "SLURM job: knn, 1 task, after the pretraining has succeeded",
    ]
    assert not (tmp_path / "run").exists()


def test_a_pretended_preemption_saves_and_the_run_goes_on(tmp_path, capsys):
    path = tiny.config(tmp_path)
    for status in (75, 0):
        assert main([str(path), "epochs=3", "--fake-preempt", "4"]) == status
    assert [found.name for found in list_checkpoints(tmp_path / "run")] == [
        "step_00000004",
        "step_00000009",
    ]
    assert "resumed" in capsys.readouterr().out


SLURM = ["launch.cluster=slurm", "launch.hours=1"]
COMMANDS = {  # key -> a value that would be a command of the job script, if it got there as it is
    "launch.partition": "gpu\ntouch PWNED\n#",
    "launch.account": "a'; touch PWNED; '",
    "launch.qos": "$(touch PWNED)",
    "launch.constraint": "`touch PWNED`",
    "output": "runs/x\ntouch PWNED\n#",
}


@pytest.mark.parametrize("key", COMMANDS)
def test_no_value_becomes_a_command_of_a_job_script(tmp_path, key):
    run = config.load(tiny.config(tmp_path), SLURM)
    section, _, name = key.rpartition(".")
    setattr(run.launch if section else run, name, COMMANDS[key])
    with pytest.raises(config.ConfigError) as error:
        slurm.request(run)
    assert str(error.value).startswith(f"{key}: {COMMANDS[key]!r} ")


def test_names_that_slurm_has_are_taken(tmp_path):
    run = config.load(tiny.config(tmp_path), [*SLURM, "launch.partition=gpu,gpu-long"])
    run.launch.constraint = "[a100*2&h100*1]"
    run.launch.account = "my_project.2026"
    assert slurm.request(run)["slurm_constraint"] == "[a100*2&h100*1]"


def test_the_job_script_of_a_checkout_and_a_run_with_strange_names_runs_nothing_else(
    tmp_path, monkeypatch
):
    """The script that submitit writes is run by bash, with an srun that shows what it is given."""
    pytest.importorskip("submitit")
    root, work = tmp_path / "a $(touch PWNED) 'check' out", tmp_path / "work"
    work.mkdir()
    (work / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    (work / "srun").chmod(0o755)
    monkeypatch.setattr(slurm, "IMPORT_ROOT", root)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    run = config.load(tiny.config(tmp_path), SLURM)
    run.output = str(tmp_path / 'it\'s; touch PWNED; $(touch PWNED) `touch PWNED` "x" & run')
    monkeypatch.setenv("PATH", f"{work}:/usr/bin:/bin")
    (work / "sbatch").symlink_to("/bin/true")  # submitit looks for it
    with slurm_submit._private_executor(run.output) as executor:
        executor.update_parameters(**slurm.request(run))
        inner = executor._executor
        text = inner._make_submission_file_text(inner._submitit_command_str, "1")
    script = work / "script.sh"
    script.write_text(text)
    shown = subprocess.run(
        ["bash", script], cwd=work, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert shown[0] == str(root) and f"{run.output}/slurm" in shown
    assert not list(tmp_path.rglob("PWNED"))


def test_printed_commands_can_be_pasted(tmp_path, monkeypatch, capsys):
    path = tiny.config(tmp_path / "a b")
    monkeypatch.setattr(slurm_submit, "submit", lambda *_arguments: ["7"])
    pretrain._submit(config.load(path, ["evaluation.at_end=[]"]), str(path), [])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"follow it: tail -f '{tmp_path}/a b/run/slurm/7_0_log.out'",
        "stop it:   scancel 7",
    ]
