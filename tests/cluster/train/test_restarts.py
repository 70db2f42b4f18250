from ray.exceptions import RayActorError

from cluster.train.restarts import CAUSE, Restarts
from roclip.errors import DataError
from roclip.report.training_state import LOG

DIED, PEER = RayActorError(), RuntimeError("Connection closed by peer\n[0] a frame")


def noted(folder):
    return [line[20:] for line in (folder / LOG).read_text().splitlines()]


def test_restarts_are_counted_and_the_cause_is_not_what_the_peers_ran_into(tmp_path):
    restarts = Restarts(tmp_path, 2)
    restarts.after_exception(None, {0: PEER, 1: DIED})
    restarts.after_exception(None, {0: PEER})
    restarts.after_exception(None, {0: DataError("no shards came.\nRun ingest."), 1: DIED})
    assert noted(tmp_path) == [
        "rank 1 died; restart 1 of 2",
        "rank 0: RuntimeError: Connection closed by peer; restart 2 of 2",
        "no shards came. Run ingest; no restart is left",
    ]
    assert (tmp_path / CAUSE).read_text() == "no shards came.\nRun ingest."


def test_a_node_that_announced_its_end_costs_no_restart(tmp_path):
    restarts = Restarts(tmp_path, 1)
    restarts.after_exception(None, {0: PEER, 1: RayActorError(preempted=True)})
    assert not (tmp_path / LOG).exists()
    assert restarts.failures == 0
