"""Exit statuses under torchrun, which restarts ranks after any nonzero one."""

from __future__ import annotations

import pytest

from ssl_pretrain import train
from ssl_pretrain.system import exit_status


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Pretend to be rank 0 of one of torchrun's attempts."""

    def begin(number: int, agents: int = 1, max_restarts: int = 3) -> None:
        error_file = tmp_path / "none_x1" / f"attempt_{number}" / "0" / "error.json"
        error_file.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(max_restarts))
        monkeypatch.setenv("GROUP_WORLD_SIZE", str(agents))

    return begin


def test_restarted_ranks_repeat_a_mistake_without_starting_anew(attempt, tmp_path, capsys):
    missing = [str(tmp_path / "none.yaml")]
    attempt(0)
    assert train.main(missing) == 2 and "none.yaml" in capsys.readouterr().err
    attempt(1)
    assert train.main(missing) == 2
    assert capsys.readouterr() == ("", "")


def test_a_new_launch_does_not_heed_an_old_note(attempt):
    attempt(0)
    exit_status.note_end(2)
    assert exit_status.status_to_repeat() is None
    attempt(2)
    assert exit_status.status_to_repeat() == 2


def test_ranks_after_a_lost_rank_have_nothing_to_repeat(attempt):
    attempt(1)
    assert exit_status.status_to_repeat() is None


@pytest.mark.parametrize(("agents", "max_restarts", "status"), [(1, 3, 75), (2, 0, 75), (2, 3, 0)])
def test_only_agents_that_would_wait_for_each_other_get_status_0(
    attempt, agents, max_restarts, status
):
    attempt(0, agents, max_restarts)
    assert exit_status.stopped_status() == status
