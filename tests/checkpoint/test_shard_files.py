"""Sharded checkpoints in several files per rank, and saves that need no copy in host memory."""

import torch
from conftest import run_ranks
from saving import build_checkpoints, build_linear_state, resume
from torch import nn
from torch.distributed.fsdp import fully_shard

from ssl_pretrain.checkpoint import tensor_files
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.distributed import collectives
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig


def build_sharded_state(seed):
    torch.manual_seed(seed)
    method = nn.Module()
    method.backbone = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5), nn.BatchNorm1d(5))
    fully_shard(method)
    optimizer = optim.build(OptimConfig(name="sgd"), method)
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return TrainingState(method, optimizer)


def full_tensors(state):
    tensors = {name: p.detach() for name, p in state.method.named_parameters()}
    for name, parameter in state._trained_parameters().items():
        for key, value in state.optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}::{key}"] = value
    return {
        name: value.full_tensor() if collectives.is_sharded(value) else value
        for name, value in tensors.items()
    }


def save_on_ranks(folder, max_bytes):
    tensor_files.MAX_SHARD_FILE_BYTES = max_bytes
    state = build_sharded_state(seed=0)
    build_checkpoints(folder, state).save(4)
    return full_tensors(state)


def resume_on_ranks(folder):
    state = build_sharded_state(seed=1)
    assert resume(folder, state) == 4
    return full_tensors(state)


def test_a_checkpoint_in_many_files_is_resumed_on_another_number_of_ranks(tmp_path):
    saved = run_ranks(save_on_ranks, tmp_path, 100, world_size=3)[0]
    (path,) = list_checkpoints(tmp_path)
    numbers = [file.name.split("-")[1] for file in path.glob("shard-*")]
    assert {number: numbers.count(number) > 2 for number in numbers} == {
        "00001": True,
        "00002": True,
        "00003": True,
    }
    for resumed in run_ranks(resume_on_ranks, tmp_path, world_size=2):
        assert resumed.keys() == saved.keys()
        assert all(torch.equal(resumed[name], value) for name, value in saved.items())
    weights = read_checkpoint(path)[1]
    assert all(torch.equal(weights[name], saved[name]) for name in saved if "::" not in name)


def test_files_hold_at_most_the_limit_or_one_larger_tensor(monkeypatch):
    monkeypatch.setattr(tensor_files, "MAX_SHARD_FILE_BYTES", 40)
    tensors = {name: torch.zeros(size) for name, size in zip("abcde", (4, 6, 1, 20, 1))}
    assert tensor_files._divide_into_files(tensors) == {"a": 1, "b": 1, "c": 2, "d": 3, "e": 4}
    monkeypatch.setattr(tensor_files, "MAX_SHARD_FILE_BYTES", 1000)
    assert set(tensor_files._divide_into_files(tensors).values()) == {1}


def test_a_save_that_waits_copies_only_tied_tensors(tmp_path):
    state = build_linear_state()
    state.method.tied = nn.Linear(3, 2)
    state.method.tied.weight = state.method.backbone.weight
    weight = state.method.backbone.weight
    for copies_host in (True, False):
        tensors = state.snapshot(copies_host)["method.safetensors"]
        same = [
            tensors[f"{name}.weight"].data_ptr() == weight.data_ptr()
            for name in ("backbone", "tied")
        ]
        assert same == [not copies_host, False]
    build_checkpoints(tmp_path, state).save(2, wait=True)
    weights = read_checkpoint(list_checkpoints(tmp_path)[0])[1]
    assert torch.equal(weights["tied.weight"], weight)
