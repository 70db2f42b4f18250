"""Waiting for room on a real cluster: what is said, when it gives up, and that it goes on when there is room."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group, placement_group_table, remove_placement_group

from cluster.ray import queueing
from cluster.ray.queueing import Need, holds, ingest_need, training_need, wait_for_room
from cluster.train.restarts import WaitLimit
from roclip.config import ClusterConfig
from roclip.errors import StageError

ONE = Need("training roclip", 2, {"CPU": 1.0})


@pytest.mark.parametrize(
    ("number", "bundle", "nodes", "fits"),
    [
        (2, {"CPU": 1.0}, [{"CPU": 1.0}, {"CPU": 1.0}], True),
        (2, {"CPU": 1.0}, [{"CPU": 1.5}], False),
        (1, {"CPU": 2.0}, [{"CPU": 1.0}, {"CPU": 1.0}], False),
        (8, {"CPU": 1.0, "GPU": 0.25}, [{"CPU": 9.0, "GPU": 2.0}], True),
        (9, {"CPU": 1.0, "GPU": 0.25}, [{"CPU": 9.0, "GPU": 2.0}], False),
        (3, {"CPU": 0.1}, [{"CPU": 0.3}], True),
        (1, {"CPU": 1.0, "ingest": 1.0}, [{"CPU": 4.0}], False),
    ],
)
def test_room_is_counted_node_by_node(number, bundle, nodes, fits):
    assert holds(Need("x", number, bundle), nodes) is fits


def test_needs_are_those_of_the_config():
    cluster = ClusterConfig(workers=4, min_workers=2, gpus_per_worker=1, ingest_resource="ingest")
    assert str(training_need(cluster, "roclip")) == "2 × {CPU: 1, GPU: 1}"
    assert str(training_need(replace(cluster, min_workers=0), "roclip")) == "4 × {CPU: 1, GPU: 1}"
    assert str(ingest_need(cluster)) == "1 × {CPU: 1, ingest: 1}"


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs, and a connection to them."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def busy(cluster):
    """One of the CPUs is taken."""
    group = placement_group([{"CPU": 1}])
    assert group.wait(60)
    yield group
    remove_placement_group(group)


def there(cluster: Cluster, **settings: float) -> ClusterConfig:
    return ClusterConfig(address=cluster.address, **settings)


@pytest.mark.ray
def test_room_that_is_there_is_taken_without_a_word(cluster):
    said: list[str] = []
    wait_for_room(ONE, there(cluster), said.append)
    assert not said
    assert all(group["state"] == "REMOVED" for group in placement_group_table().values())


@pytest.mark.ray
def test_says_what_it_waits_for_and_goes_on_when_there_is_room(cluster, busy):
    said: list[str] = []
    spoke = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        spoke.set()

    def make_room() -> None:
        assert spoke.wait(60)
        remove_placement_group(busy)

    other = threading.Thread(target=make_room)
    other.start()
    wait_for_room(ONE, there(cluster), say)
    other.join()
    assert said == ["training roclip waits for 2 × {CPU: 1}; the cluster has 1 of 2 CPU free"]


@pytest.mark.ray
def test_gives_up_when_it_has_waited_long_enough(cluster, busy):
    with pytest.raises(StageError, match=r"waited \d+ s for 2 × \{CPU: 1\}, in vain.*queue_timeout_s"):
        wait_for_room(ONE, there(cluster, queue_timeout_s=0.5), print)


@pytest.mark.ray
def test_what_no_node_could_hold_is_refused_after_nodes_had_time_to_join(cluster):
    said: list[str] = []
    never = Need("training roclip", 1, {"CPU": 1.0, "GPU": 1.0})
    with pytest.raises(StageError, match=r"expected nodes that hold 1 × \{CPU: 1, GPU: 1\}, got \{CPU: 2\}"):
        wait_for_room(never, there(cluster), said.append, joining_s=3)
    assert "could not hold it even if idle" in said[0]
    with pytest.raises(StageError, match="Add nodes"):
        wait_for_room(never, ClusterConfig(), print)


@pytest.mark.ray
def test_node_that_joins_makes_room(cluster):
    need = Need("ingest", 1, {"CPU": 1.0, "ingest": 1.0})
    added = []
    wait_for_room(need, there(cluster), lambda _: added.append(cluster.add_node(num_cpus=1, resources={"ingest": 1})))
    assert added
    cluster.remove_node(added[0])


class _State:
    def __init__(self, name: str):
        self._state_type = type("Kind", (), {"name": name})


@pytest.mark.ray
def test_ranks_that_find_no_room_again_are_told_of_and_given_up(cluster, tmp_path: Path):
    noted: list[str] = []
    patience = WaitLimit(ONE, 0.2, noted.append, tmp_path / "failure.txt")
    patience.after_controller_state_update(_State("RUNNING"), _State("RESCHEDULING"))
    assert len(noted) == 1
    assert "waits for 2 × {CPU: 1}" in noted[0]
    time.sleep(0.3)
    patience.after_controller_state_update(_State("SCHEDULING"), _State("RUNNING"))
    patience.after_controller_state_update(_State("RUNNING"), _State("RESCHEDULING"))
    time.sleep(0.3)
    with pytest.raises(StageError, match="in vain"):
        patience.after_controller_state_update(_State("SCHEDULING"), _State("RESCHEDULING"))
    assert "in vain" in (tmp_path / "failure.txt").read_text()
    assert len(noted) == 2


def test_states_of_ray_train_are_called_as_patience_expects():
    from ray.train.v2._internal.execution.controller.state import TrainControllerStateType

    assert {"RUNNING", "RESCHEDULING"} <= set(TrainControllerStateType.__members__)
    assert queueing.JOINING_S > 0
