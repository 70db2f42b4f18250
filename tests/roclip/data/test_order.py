"""The order of samples, over grids of (shards, streams, buffer, run, batch, ranks, workers)."""

import itertools
import pickle

import numpy as np
import pytest

from roclip.data.order import EpochOrder, visits


def order_of(samples, *, seed=1, epoch=2, streams=4, shuffle_buffer=16, run_length=3):
    return EpochOrder(
        samples, seed=seed, epoch=epoch, streams=streams, shuffle_buffer=shuffle_buffer, run_length=run_length
    )


def one_by_one(samples, *, seed, epoch, streams, shuffle_buffer, run_length):
    """The order as the module's docstring tells it, written out: lists, and a loop over turns."""
    streams = min(streams, len(samples))
    dealt = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(samples))
    queues = []
    for stream in range(streams):
        queue = [(shard, number) for shard in dealt[stream::streams] for number in range(samples[shard])]
        shuffled = []
        for buffer, start in enumerate(range(0, len(queue), shuffle_buffer)):
            part = queue[start : start + shuffle_buffer]
            bits = np.random.Philox(key=[seed, epoch], counter=[0, 0, stream + 1, buffer])
            shuffled += [part[place] for place in np.random.Generator(bits).permutation(len(part))]
        queues.append(shuffled)
    rows = []
    while any(queues):
        for stream, queue in enumerate(queues):
            rows += queue[:run_length]
            queues[stream] = queue[run_length:]
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


@pytest.mark.parametrize("samples", [[5], [7, 1, 20], [10] * 9, [3, 0, 8, 0], [0, 0], list(range(17))])
@pytest.mark.parametrize("streams", [1, 3, 4, 16])
@pytest.mark.parametrize(("shuffle_buffer", "run_length"), [(1, 1), (10, 3), (1000, 7)])
def test_order_is_the_one_written_out(samples, streams, shuffle_buffer, run_length):
    settings = {"streams": streams, "shuffle_buffer": shuffle_buffer, "run_length": run_length}
    order = order_of(samples, **settings)
    rows = order.at(np.arange(len(order)))
    assert np.array_equal(rows, one_by_one(samples, seed=1, epoch=2, **settings))
    assert sorted(map(tuple, rows.tolist())) == [(s, n) for s, number in enumerate(samples) for n in range(number)]


@pytest.mark.parametrize(
    ("nodes", "ranks", "workers", "streams", "batch", "per_shard"),
    list(itertools.product([1, 2], [1, 4], [1, 3], [4, 6, 32], [16, 48], [5, 30])),
)
def test_any_ranks_and_workers_together_take_every_sample_once_in_one_order(
    nodes, ranks, workers, streams, batch, per_shard
):
    samples = [per_shard + number % 3 for number in range(13)]
    settings = {"streams": streams, "run_length": -(-batch // streams)}
    alone = order_of(samples, **settings)
    steps, world = len(alone) // batch, nodes * ranks
    rows = batch // world
    taken = np.zeros((steps, batch, 2), dtype=np.int64)
    for rank, worker in itertools.product(range(world), range(workers)):
        own = pickle.loads(pickle.dumps(order_of(samples, **settings)))  # as a loader's process gets it
        for step in range(worker, steps, workers):
            taken[step, rank * rows : (rank + 1) * rows] = own.at(step * batch + rank * rows + np.arange(rows))
    assert np.array_equal(taken.reshape(-1, 2), alone.at(np.arange(steps * batch)))
    assert len({tuple(row) for row in taken.reshape(-1, 2).tolist()}) == steps * batch


def test_a_resume_at_any_position_goes_on_as_if_it_had_not_stopped():
    samples = [9, 30, 2, 14, 14]
    whole = order_of(samples)
    rows = whole.at(np.arange(len(whole)))
    for position in range(len(whole)):
        assert np.array_equal(order_of(samples).at(np.arange(position, len(whole))), rows[position:])


def test_order_differs_between_epochs_and_seeds():
    def rows(seed, epoch):
        order = order_of([20, 20, 20], seed=seed, epoch=epoch)
        return order.at(np.arange(60))

    assert np.array_equal(rows(0, 1), rows(0, 1))
    assert not np.array_equal(rows(0, 1), rows(0, 2))
    assert not np.array_equal(rows(0, 1), rows(1, 1))
    assert not np.array_equal(rows(0, 1), rows(1, 0))


def test_positions_beyond_the_epoch_are_refused():
    with pytest.raises(IndexError, match="60 samples: got 0 to 60"):
        order_of([20, 20, 20]).at(np.arange(61))
    assert order_of([]).at(np.arange(0)).shape == (0, 2)


def test_a_first_position_is_equally_often_of_any_shard():
    """Chi-square of the shard at the first and at the last place, over 2,000 seeds: 99.99 % of fair ones are below."""
    from scipy.stats import chi2

    ends = np.array([order_of([10] * 8, seed=seed).at(np.array([0, 79]))[:, 0] for seed in range(2000)])
    for column in ends.T:
        counts = np.bincount(column, minlength=8)
        assert ((counts - 250) ** 2 / 250).sum() < chi2.ppf(0.9999, 7)


def test_visits_read_a_source_as_often_as_its_weight_says():
    sources, weights = ["a"] * 100 + ["b"] * 50 + ["c"] * 7, {"a": 0.3, "b": 2.5}
    counts = []
    for epoch in range(40):
        times = np.bincount(visits(sources, weights, seed=3, epoch=epoch), minlength=157)
        assert times[:100].sum() == 30
        assert sorted(times[100:150].tolist()) == [2] * 25 + [3] * 25
        assert times[150:].tolist() == [1] * 7
        counts.append(times)
    mean = np.mean(counts, axis=0)
    assert np.abs(mean[:100] - 0.3).max() < 0.35  # 40 epochs: five standard deviations
    assert np.abs(mean[100:150] - 2.5).max() < 0.4
    again = visits(sources, weights, seed=3, epoch=39)
    assert np.array_equal(np.bincount(again, minlength=157), counts[-1])
    assert not np.array_equal(counts[0], counts[1])


def test_visits_without_weights_are_each_shard_once():
    assert visits(["a", "b", "a"], {}, seed=0, epoch=0).tolist() == [0, 1, 2]
    assert visits(["a", "b", "a"], {"a": 0.0}, seed=0, epoch=0).tolist() == [1]


def test_resampled_visits_draw_as_many_with_replacement():
    sources, weights = ["a"] * 300 + ["b"] * 100, {"b": 3.0}
    drawn = visits(sources, weights, seed=0, epoch=1, resampled=True)
    assert len(drawn) == 600
    assert np.bincount(drawn).max() > 1
    assert abs((drawn >= 300).mean() - 0.5) < 0.1  # 3 x 100 of 600, five standard deviations
