import importlib.util
import json
from pathlib import Path

import pytest
import torch
from forked import run_script

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_gradients_gate_and_pool_match_one_process(ranks, tmp_path):
    spec = importlib.util.spec_from_file_location("two_ranks", HERE / "two_ranks.py")
    two_ranks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(two_ranks)
    alone = two_ranks.solve(24, 0, 24)
    run_script(ranks, HERE / "two_ranks.py", tmp_path)
    for rank in range(ranks):
        ours = torch.load(tmp_path / f"{ranks}-{rank}.pt", weights_only=True)
        assert torch.allclose(ours["loss"], alone["loss"], atol=1e-6)
        for mine, reference in zip(ours["gradients"], alone["gradients"], strict=True):
            assert torch.allclose(mine, reference, atol=1e-6)
        assert ours["checksum"] == alone["checksum"]
        assert torch.equal(ours["slots"], alone["slots"])
        assert torch.equal(ours["suspected"], alone["suspected"])
        assert torch.equal(ours["neighbours"], alone["neighbours"])
        assert torch.equal(ours["scores"], alone["scores"])


def test_what_one_rank_does_alone_may_take_longer_than_a_collective(tmp_path):
    run_script(2, HERE / "lead_ranks.py", tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == ["done by rank 0", "nothing came"]
