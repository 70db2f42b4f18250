import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from forked import run_script

from roclip.defence import search

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pool_ranks", HERE / "pool_ranks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_replicated_and_sharded_pools_answer_as_one_process_bit_for_bit(ranks, script, tmp_path):
    run_script(ranks, HERE / "pool_ranks.py", tmp_path)
    for size, storage in script.CASES:
        alone = script.solve(size, storage, 1 << 20)
        state = alone.pop("state")
        for shard_above in (0, 1 << 20):
            for rank in range(ranks):
                ours = torch.load(tmp_path / f"{size}-{storage}-{shard_above}-{rank}.pt", weights_only=True)
                saved = ours.pop("state")
                if rank == 0:
                    assert saved.keys() == state.keys()
                    assert all(torch.equal(saved[name], state[name]) for name in state)
                assert ours.keys() == alone.keys()
                for name, value in alone.items():
                    same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value
                    assert same, (size, storage, shard_above, rank, name)


def test_one_process_answers_as_exhaustive_numpy_ties_included(script):
    tied = 0
    for size, storage in script.CASES:
        answer = script.solve(size, storage, 1 << 20)
        pool = answer["state"]["features"][:, :].double().numpy()
        scores = search.snap(script.queries()).double().numpy() @ pool.T
        assert np.array_equal(answer["3 slots"][:, 0].numpy(), scores.argmax(axis=1))  # the first of equals
        assert np.array_equal(answer["3 similarity"][:, 0].numpy(), scores.max(axis=1).astype(np.float32))
        assert torch.equal(answer["3 features"], answer["state"]["features"][answer["3 slots"][:, 0]].float())
        tied += int(((scores == scores.max(axis=1, keepdims=True)).sum(axis=1) > 1).sum())
    assert tied > 20
