"""launch/pretrain.py and launch/sweep.py as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from ssl_pretrain import config
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.launch import local, pretrain, slurm, slurm_job, sweep
from ssl_pretrain.system import program
from ssl_pretrain.train import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "evaluations",
    [["knn", "report"], pytest.param(["knn", "linear", "report"], marks=pytest.mark.full)],
)
def test_one_command_trains_evaluates_and_reports(tmp_path, evaluations):
    at_end = f"evaluation.at_end=[{','.join(evaluations)}]"
    arguments = [str(tiny.write_config(tmp_path)), "epochs=1", "launch.ranks=2", at_end]
    result = subprocess.run(
        [sys.executable, "launch/pretrain.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    run = tmp_path / "run"
    manifest = json.loads((run / "checkpoints" / "step_00000003" / "manifest.json").read_text())
    assert manifest["machine"]["world_size"] == 2
    result_files = {file.name for file in (run / "eval").iterdir()}
    assert {f"{name}.json" for name in evaluations[:-1]} <= result_files
    assert (run / "report.html").exists()
    phases = [line for line in result.stdout.splitlines() if line.startswith("--- ")]
    expected = [f"--- {name}" for name in ["pretraining", *evaluations]]
    assert phases[: len(expected)] == expected


def test_the_commands_for_several_hosts_are_exact(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
    assert pretrain.main([str(path), "launch.hosts=a,b", "launch.ranks=4", "seed=3"]) == 0
    torchrun = (
        "env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 2 --rdzv-backend c10d "
        "--rdzv-endpoint a:29500 --rdzv-id run --rdzv-conf is_host={} --local-addr {} "
        "--max-restarts 3 --nproc-per-node 4 -m ssl_pretrain.train {} launch.ranks=4 seed=3"
    )
    assert capsys.readouterr().out.splitlines() == [
        "# on a",
        torchrun.format(1, "a", path),
        "# on b",
        torchrun.format(0, "b", path),
    ]


@pytest.mark.parametrize("hosts", ["a\ntouch taken", "a,b,a", ",", "a,-b", "$(id)"])
def test_hosts_that_are_invalid_or_contain_commands_are_refused(tmp_path, capsys, hosts):
    """Users paste the printed commands into a shell."""
    assert pretrain.main([str(tiny.write_config(tmp_path)), f"launch.hosts={hosts}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: launch.hosts: ")
    assert err.endswith(
        f" in {hosts!r} is not a valid host name or address, or appears twice; "
        "give distinct hosts, such as a,b,10.0.0.3\n"
    )


def test_a_sweep_refuses_hosts_and_unknown_evaluations_before_its_first_run(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
    assert sweep.main([str(path), "seed=0,1", "launch.hosts=a"]) == 2
    assert capsys.readouterr().err == (
        "error: launch.hosts: 'a' cannot be used for a series of runs, which start one after the "
        "other on this machine; leave it out, or start each run with launch/pretrain.py\n"
    )
    assert sweep.main([str(path), "seed=0,1", "evaluation.at_end=[knn,nearest]"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: evaluation.at_end: 'nearest' is not an evaluation; choose among: knn, "
    )


def test_a_plan_trains_nothing(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
    assert pretrain.main([str(path), "--plan", "launch.ranks=2"]) == 0
    out = capsys.readouterr().out
    assert "embeddings per loss: 48 (2 views x 24 images); negatives per anchor: 46" in out
    assert (
        "steps per epoch: 3 (78 images, the last incomplete batch dropped); 24 in 8 epochs" in out
    )
    assert not (tmp_path / "run").exists()


def test_a_run_of_sentences_cannot_end_with_evaluations_of_images(tmp_path, capsys):
    path = tiny.write_sentence_config(tmp_path)
    assert pretrain.main([str(path), "evaluation.at_end=[text_pairs,knn]"]) == 2
    assert capsys.readouterr().err == (
        "error: evaluation.at_end: knn needs a method of images, and simcse takes sentences; "
        "choose among: sts, text_pairs\n"
    )


def test_a_mistake_is_reported_in_one_line(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
    assert pretrain.main([str(path), "evaluation.at_end=[knnn]"]) == 2
    assert capsys.readouterr().err == (
        "error: evaluation.at_end: 'knnn' is not an evaluation; choose among: knn, linear, "
        "attentive, spectrum, retrieval, robustness, semi, finetune, zeroshot, captions, sts, "
        "text_pairs, export, report\n"
    )
    assert pretrain.main([str(path), "evaluation.at_end=[knn,sts]"]) == 2
    assert capsys.readouterr().err == (
        "error: evaluation.at_end: sts needs a method of sentences, and simclr takes images; "
        "choose among: knn, linear, attentive, spectrum, retrieval, robustness, semi, finetune, "
        "zeroshot, captions, export, report\n"
    )
    assert pretrain.main([str(path), "launch.ranks=5"]) == 2
    assert capsys.readouterr().err == (
        "error: global_batch_size: 24 does not divide evenly over 5 ranks; give 20 or 25\n"
    )


def test_one_rank_needs_no_torchrun(tmp_path):
    path = str(tiny.write_config(tmp_path))
    command = [sys.executable, "-m", "ssl_pretrain.train", path, "seed=1"]
    assert local.train_command(path, ["seed=1"], 1) == command
    assert "--standalone" in local.train_command(path, [], 2)
    assert local.num_ranks(config.load(path, ["launch.ranks=3"])) == 3


def test_a_sweep_is_the_product_of_its_values(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
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
    settings = ["seed=1", "optim.base_lr=0.2", "method.projector_dims=[16,8]"]
    assert sweep.combine_values(str(path), arguments[1:])[3][:3] == settings
    assert sweep.main([str(path), "seed"]) == 2
    assert capsys.readouterr().err == (
        "error: 'seed': not an override; give key=value, such as optim.base_lr=0.2,0.3\n"
    )


def test_the_runs_of_a_sweep_are_one_group_in_wandb_unless_they_have_one(tmp_path, monkeypatch):
    path, groups = tiny.write_config(tmp_path), []

    def record_groups(runs, path):
        loaded = [config.load(path, overrides) for _, overrides in runs]
        groups.append([run.log.group for run in loaded])
        return 0

    monkeypatch.setattr(sweep.pretrain, "pretrain_series", record_groups)
    arguments = [str(path), "seed=0,1", f"output={tmp_path / 'sweep'}", "launch.cluster=local"]
    assert sweep.main(arguments) == sweep.main([*arguments, "log.group=mine"]) == 0
    assert groups == [["sweep"] * 2, ["mine"] * 2]


def test_slurm_is_available_only_if_its_controller_answers(tmp_path, monkeypatch):
    """A machine may have SLURM's commands but no cluster."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm.is_available()
    for status, available in ((1, False), (0, True)):
        for command in ("sbatch", "scontrol"):
            (tmp_path / command).write_text(f"#!/bin/sh\nexit {status}\n")
            (tmp_path / command).chmod(0o755)
        assert slurm.is_available() is available
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not slurm.is_available()


CLUSTER = ["launch.nodes=2", "launch.hours=1.5", "data.num_workers=12", "launch.memory_gb=900"]


def test_slurm_jobs_request_the_configured_resources(tmp_path):
    settings = [*CLUSTER, "launch.gpus_per_node=8", "launch.partition=gpu"]
    run = config.load(tiny.write_config(tmp_path), settings)
    request = slurm.job_parameters(run)
    assert slurm.num_ranks(run) == 16
    expected = {
        "nodes": 2,
        "tasks_per_node": 8,
        "cpus_per_task": 12,
        "timeout_min": 90,
        "slurm_partition": "gpu",
        "mem_gb": 900,
    }
    assert {key: request[key] for key in expected} == expected
    additional = {"open_mode": "append", "gpus_per_node": 8}
    assert request["slurm_additional_parameters"] == additional | {"requeue": True}
    settings += ["launch.requeue=false", "launch.chain=3"]
    chain = slurm.job_parameters(config.load(tmp_path / "tiny.yaml", settings))
    assert chain["slurm_additional_parameters"] == additional | {"no_requeue": True}


def test_a_time_limit_shorter_than_signal_seconds_is_refused(tmp_path):
    with pytest.raises(config.ConfigError) as error:
        slurm.job_parameters(config.load(tiny.write_config(tmp_path), ["launch.hours=0.01"]))
    assert str(error.value) == (
        "launch.signal_seconds: 120 is not shorter than the time limit, launch.hours: 0.01; "
        "give fewer seconds"
    )


def test_a_plan_shows_the_slurm_jobs(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
    settings = [
        *CLUSTER,
        "launch.cluster=slurm",
        "launch.gpus_per_node=4",
        "launch.partition=gpu",
        "launch.chain=3",
        "evaluation.at_end=[knn]",
    ]
    assert pretrain.main([str(path), "--plan", *settings]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "SLURM job: 3 x pretraining, one after the other (run): 2 nodes x 4 tasks = 8 ranks, "
        "12 CPUs per task, 4 GPUs per node, 900 GB per node, 90 min, "
        "SIGUSR2 120 s before the limit, requeued until the run has ended, partition gpu",
        "SLURM job: knn, 1 task, after the pretraining has succeeded",
    ]
    assert not (tmp_path / "run").exists()


def test_a_run_saves_at_a_simulated_preemption_and_resumes(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
    for status in (75, 0):
        assert main([str(path), "epochs=3", "--fake-preempt", "4"]) == status
    checkpoints = [checkpoint.name for checkpoint in list_checkpoints(tmp_path / "run")]
    assert checkpoints == ["step_00000004", "step_00000009"]
    assert "resumed" in capsys.readouterr().out


def test_train_refuses_launch_keys_unless_a_yaml_or_a_launcher_has_them(
    tmp_path, capsys, monkeypatch
):
    path = tiny.write_config(tmp_path)
    path.write_text(f"{path.read_text()}launch: {{cluster: slurm, ranks: 2, hours: 1}}\n")
    assert main([str(path), "--plan"]) == 0
    capsys.readouterr()
    assert main([str(path), "--plan", "launch={cluster: slurm, port: 1234}"]) == 2
    launcher = program.command("pretrain")
    assert capsys.readouterr().err == (
        f"error: launch.cluster: slurm, launch.port: 1234: only `{launcher}` uses these keys, and "
        f"this command trains in its own process; use `{launcher}`, or remove these keys\n"
    )
    monkeypatch.setenv("RANK", "0")  # torchrun starts the commands that launch.hosts prints
    assert main([str(path), "--plan", "launch.ranks=4", "launch.port=1234"]) == 0
    assert main([str(path), "--plan", "launch.cluster=slurm"]) == 2
    monkeypatch.setenv(program.LAUNCHED_VARIABLE, "1")
    assert main([str(path), "--plan", "launch.cluster=slurm"]) == 0


SLURM = ["launch.cluster=slurm", "launch.hours=1"]
INJECTIONS = {  # key -> value that would be a command if the job script contained it unquoted
    "launch.partition": "gpu\ntouch PWNED\n#",
    "launch.account": "a'; touch PWNED; '",
    "launch.qos": "$(touch PWNED)",
    "launch.constraint": "`touch PWNED`",
    "output": "runs/x\ntouch PWNED\n#",
}


@pytest.mark.parametrize("key", INJECTIONS)
def test_no_value_becomes_a_command_in_a_job_script(tmp_path, key):
    run = config.load(tiny.write_config(tmp_path), SLURM)
    section, _, name = key.rpartition(".")
    setattr(run.launch if section else run, name, INJECTIONS[key])
    with pytest.raises(config.ConfigError) as error:
        slurm.job_parameters(run)
    assert str(error.value).startswith(f"{key}: {INJECTIONS[key]!r} ")


def test_valid_slurm_names_are_accepted(tmp_path):
    run = config.load(tiny.write_config(tmp_path), [*SLURM, "launch.partition=gpu,gpu-long"])
    run.launch.constraint = "[a100*2&h100*1]"
    run.launch.account = "my_project.2026"
    assert slurm.job_parameters(run)["slurm_constraint"] == "[a100*2&h100*1]"


def test_commands_in_the_paths_of_the_checkout_and_the_run_are_not_executed(tmp_path, monkeypatch):
    """Bash runs the script that submitit writes. A fake srun prints its arguments."""
    pytest.importorskip("submitit")
    root, work = tmp_path / "a $(touch PWNED) 'check' out", tmp_path / "work"
    work.mkdir()
    (work / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    (work / "srun").chmod(0o755)
    monkeypatch.setattr(slurm, "IMPORT_ROOT", root)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    run = config.load(tiny.write_config(tmp_path), SLURM)
    run.output = str(tmp_path / 'it\'s; touch PWNED; $(touch PWNED) `touch PWNED` "x" & run')
    monkeypatch.setenv("PATH", f"{work}:/usr/bin:/bin")
    (work / "sbatch").symlink_to("/bin/true")  # submitit looks for it
    with slurm_job._private_executor(run.output) as executor:
        executor.update_parameters(**slurm.job_parameters(run))
        slurm_executor = executor._executor
        text = slurm_executor._make_submission_file_text(slurm_executor._submitit_command_str, "1")
    script = work / "script.sh"
    script.write_text(text)
    output = subprocess.run(
        ["bash", script], cwd=work, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert output[0] == str(root)
    assert f"{run.output}/slurm" in output
    assert not list(tmp_path.rglob("PWNED"))


def test_printed_commands_can_be_pasted_into_a_shell(tmp_path, monkeypatch, capsys):
    path = tiny.write_config(tmp_path / "a b")
    monkeypatch.setattr(slurm_job, "submit", lambda *_arguments: ["7"])
    pretrain._submit(config.load(path, ["evaluation.at_end=[]"]), str(path), [])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"follow it: tail -f '{tmp_path}/a b/run/slurm/7_0_log.out'",
        "stop it:   scancel 7",
    ]
