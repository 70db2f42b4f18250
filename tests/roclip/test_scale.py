"""What must hold of the scale model and its simulations, whatever was measured."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scale_model import Cluster, Job, Measured, Wire, along, bottleneck, efficiency, fetched_times, parts, step_s
from scale_sim import Failures, Fetching, goodput, slowest_rank, stalled_step_s, train_while_arriving

from roclip.data.order import EpochOrder


def measured(**changes) -> Measured:
    """One model whose towers take 0.1 s, and a search of 1 ns for each query and caption."""
    step = {"step_s": [0.102, 0.1, 0.101], "augment_s": 0.01, "forward_s": 0.03, "loss_s": 0.001}
    step |= {"backward_s": 0.06, "optimizer_s": 0.001, "model": "M", "B": 256}
    found = {
        "models": [
            {
                "model": "M",
                "precision": "bf16",
                "weights": 10**8,
                "batch_norm_layers": 0,
                "D": 512,
                "checkpoint_bytes": 16 * 10**8,
                "checkpoint_still_s": 0.5,
            }
        ],
        "steps": [step | {"kind": kind} for kind in ("plain", "matched")],
        "searches": [
            {"D": 512, "P": size, "B": batch, "storage": "fp32", "search_s": 1e-9 * size * batch}
            for size in (1 << 16, 1 << 18)
            for batch in (256, 1024)
        ],
        "enqueues": [{"D": 512, "G": came, "enqueue_s": 1e-8 * came} for came in (256, 4096)],
        "losses": [{"D": 512, "B": 256, "W": w, "loss_s": 1e-4 * w, "gather_s": 1e-6 * w} for w in (1, 8, 64)],
        "sharded": [{"D": 512, "P": 1 << 22, "B": 256, "W": w, "search_s": 1.1 + 1e-3 * w} for w in (8, 64)],
        "defences": [{"P": size, "B": 256, "defence_s": 0.1 + 1e-6 * size} for size in (20_000, 60_000)],
        "loader": [{"workers": 1, "images_per_s": 1000.0}],
    }
    return Measured(found | changes)


def test_all_reduce_when_ring_is_the_formula():
    wire = Wire.ring(4, 1e9, 1e-6)
    assert wire.all_reduce_s(1e6) == pytest.approx(2 * 3 * 1e-6 + 2 * 3 / 4 * 1e-3)
    assert wire.all_gather_s(1e6) == pytest.approx(3 * 1e-6 + 3 / 4 * 1e-3)


def test_collectives_when_alone_take_nothing():
    assert Wire(1, 8, 1e9).all_reduce_s(1e9) == 0.0
    found = parts(measured(), Job("M", gpus=1))
    assert found["gradients"] == found["gather"] == 0.0


def test_all_reduce_when_large_runs_at_the_bandwidth_and_when_small_at_the_latency():
    wires = [Wire(gpus, 8, 1e11) for gpus in (16, 1024)]
    assert wires[1].all_reduce_s(1e11) / wires[0].all_reduce_s(1e11) < 1.2
    assert wires[1].all_reduce_s(8) < 1e-3  # a tree, not 2,046 hops
    assert wires[1].all_gather_s(8) > 32 * wires[0].all_gather_s(8)


def test_search_when_the_pool_doubles_takes_twice_as_long():
    given = measured()
    assert given.search_s(512, 1 << 17, 256) == pytest.approx(2 * given.search_s(512, 1 << 16, 256))
    assert given.search_s(512, 1 << 21, 256) == pytest.approx(2 * given.search_s(512, 1 << 20, 256))


def test_sharded_search_when_it_sorts_more_answers_takes_longer():
    given = measured()
    assert given.sharded_s(512, 1 << 22, 256, 8) == pytest.approx(1.108)
    assert given.sharded_s(512, 1 << 21, 256, 64) == pytest.approx(1.108 / 2 + 0.056)
    assert given.sharded_s(512, 1 << 21, 512, 64) == pytest.approx(1.108 + 0.112)


def test_defence_when_the_pool_grows_grows_by_a_straight_line():
    assert measured().defence_s(100_000, 512) == pytest.approx(2 * (0.1 + 0.1))


def test_along_when_between_and_beyond():
    points = {10.0: 1.0, 1000.0: 3.0}
    assert along(points, 10) == 1.0
    assert along(points, 100) == pytest.approx(math.sqrt(3))
    assert along(points, 2000) == pytest.approx(6.0)
    assert along(points, 1) == 1.0


def test_step_when_the_store_keeps_up_is_the_sum_and_when_not_is_the_store():
    found = parts(measured(), Job("M", gpus=8))
    assert found["store"] < found["towers"]
    assert step_s(found) == pytest.approx(sum(found[part] for part in found if part not in ("loader", "store")))
    slow = parts(measured(), Job("M", gpus=8, cluster=Cluster(store_bytes_per_s=1e6)))
    assert step_s(slow) == slow["store"]
    assert bottleneck(slow) == "store"


def test_efficiency_when_the_link_is_slower_or_the_ranks_are_more_falls():
    given = measured()
    by_link = [
        efficiency(given, Job("M", 64, cluster=Cluster(link=name))) for name in ("400 Gb/s a GPU", "25 Gb/s a node")
    ]
    assert 1 > by_link[0] > by_link[1] > 0
    by_gpus = [efficiency(given, Job("M", 2**power)) for power in range(3, 11)]
    assert by_gpus == sorted(by_gpus, reverse=True)


def test_gradients_when_overlapped_hide_behind_the_backward_pass():
    given, cluster = measured(), Cluster(link="100 Gb/s a node")
    exposed = [
        parts(given, Job("M", 64, overlap_frac=share, cluster=cluster))["gradients"] for share in (0.0, 0.5, 1.0)
    ]
    assert exposed[0] - exposed[1] == pytest.approx(0.5 * 0.06)
    assert exposed[1] > exposed[2] == 0.0


def test_bottleneck_when_the_pool_is_huge_is_the_pool():
    assert bottleneck(parts(measured(), Job("M", 8, pool=1 << 16))) == "towers"
    assert bottleneck(parts(measured(), Job("M", 8, pool=1 << 20))) == "pool"


def test_step_when_the_sharded_pool_does_not_fit_never_ends():
    rows = [*measured().found["sharded"], {"D": 512, "P": 1 << 22, "B": 256, "W": 256, "out_of_memory": True}]
    found = parts(measured(sharded=rows), Job("M", 256, pool=1 << 22))
    assert step_s(found) == math.inf
    assert bottleneck(found) == "pool"
    whole = parts(measured(sharded=rows), Job("M", 256, pool=1 << 22, shard_above=1 << 22))
    assert math.isfinite(step_s(whole))


@pytest.mark.parametrize(("nodes", "streams"), [(2, 8), (8, 4), (4, 4)])
def test_fetched_times_is_what_the_order_of_an_epoch_does(nodes: int, streams: int):
    ranks, rows, per_tar = nodes * 2, 8, 256
    batch = ranks * rows
    order = EpochOrder([per_tar] * 32, seed=0, epoch=1, streams=streams, shuffle_buffer=16, run_length=batch // streams)
    positions = np.arange(len(order))
    node = positions % batch // (2 * rows)
    pairs = {(int(tar), int(where)) for tar, where in zip(order.at(positions)[:, 0], node, strict=True)}
    assert len(pairs) / 32 == pytest.approx(fetched_times(nodes, streams), rel=0.05)


def test_slowest_rank_when_steps_are_alike_or_ranks_many():
    random = np.random.default_rng(0)
    assert slowest_rank([0.1] * 5, 1024, random) == pytest.approx(1.0)
    assert slowest_rank([0.1] * 99 + [0.3], 10**6, random) == pytest.approx(3.0, rel=0.02)
    assert slowest_rank([0.1] * 99 + [0.3], 1, random) < 1.1


def test_goodput_agrees_with_the_closed_form():
    """Daly, A higher order estimate of the optimum checkpoint interval (2006): the exact cost under exponential failures."""
    given = Failures(1000.0, 600.0, 6.0, 0.0, 60.0)
    mean_s = 1000.0 * 3600 / 256
    exact = 600.0 / (mean_s * math.exp(60.0 / mean_s) * (math.exp(606.0 / mean_s) - 1))
    assert goodput(256, given, np.random.default_rng(0)) == pytest.approx(exact, rel=0.01)
    assert goodput(1024, given, np.random.default_rng(0)) < exact


def test_stalled_step_when_the_store_is_fast_slow_or_far():
    def took_s(**changes) -> float:
        fast = Fetching(8, 16, 1000, 3e7, 1e15, 1e15, 0.0, 4, 1.0)
        return stalled_step_s(0.1, 1600, replace(fast, **changes), np.random.default_rng(0))

    assert took_s() == pytest.approx(0.1)
    assert took_s(store_bytes_per_s=1e8) == pytest.approx(1600 * 3e4 / 1e8, rel=0.1)
    far = took_s(connection_bytes_per_s=1e8, batches_ahead=0)
    assert far > took_s(connection_bytes_per_s=1e8) > 0.103
    assert took_s(connection_bytes_per_s=1e8, tars_ahead=True) == pytest.approx(0.1)


def test_train_while_arriving_when_ingest_is_fast_or_slow():
    fast = train_while_arriving(1e6, 1e9, 1e3, epochs=4, start_frac=1.0)
    assert fast.hours * 3600 == pytest.approx(4000, rel=0.01)
    assert fast.samples_frac == 1.0
    slow = train_while_arriving(1e6, 1e3, 1e6, epochs=4, start_frac=0.1)
    assert slow.seen_frac < 0.11
