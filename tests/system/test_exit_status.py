"""Exit statuses under torchrun, which restarts ranks after a nonzero status."""

import pytest

from ssl_pretrain import train
from ssl_pretrain.system import exit_status


@pytest.fixture
def start_attempt(tmp_path, monkeypatch):
    """Return a function that makes this process rank 0 of a torchrun attempt."""

    def start(number: int, agents: int = 1, max_restarts: int = 3) -> None:
        error_file = tmp_path / "none_x1" / f"attempt_{number}" / "0" / "error.json"
        error_file.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(max_restarts))
        monkeypatch.setenv("GROUP_WORLD_SIZE", str(agents))

    return start


def test_restarted_ranks_repeat_the_status_of_a_mistake_at_once(start_attempt, tmp_path, capsys):
    arguments = [str(tmp_path / "none.yaml")]
    start_attempt(0)
    assert train.main(arguments) == 2 and "none.yaml" in capsys.readouterr().err
    start_attempt(1)
    assert train.main(arguments) == 2
    assert capsys.readouterr() == ("", "")


def test_the_first_attempt_ignores_a_recorded_status(start_attempt):
    start_attempt(0)
    assert exit_status.record_failure(ValueError()) == exit_status.USER_ERROR
    assert exit_status.status_to_repeat() is None
    start_attempt(2)
    assert exit_status.status_to_repeat() == 2


def test_ranks_restarted_after_a_lost_rank_have_nothing_to_repeat(start_attempt):
    start_attempt(1)
    assert exit_status.status_to_repeat() is None


@pytest.mark.parametrize(("agents", "max_restarts", "status"), [(1, 3, 75), (2, 0, 75), (2, 3, 0)])
def test_a_stopped_rank_exits_with_0_if_agents_would_wait_for_each_other(
    start_attempt, agents, max_restarts, status
):
    start_attempt(0, agents, max_restarts)
    assert exit_status.record_stop() == status
