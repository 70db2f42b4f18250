"""Training steps on 1, 2 and 4 ranks, at each ZeRO stage, against plain torch in one process with open_clip's losses."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from forked import run_script
from open_clip.loss import SigLipLoss

from roclip import distributed
from roclip.defence.pool import CaptionPool
from roclip.training.engine import parameter_groups

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("ranks_steps", HERE / "ranks_steps.py")
assert _spec is not None
ranks_steps = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks_steps)
Case = ranks_steps.Case

STAGES = [Case("vit", stage) for stage in range(4)]
CASES = {
    1: [*STAGES, Case("vit", 3, pieces=2)],
    2: [
        *STAGES,
        *(Case("vit", stage, pieces=2) for stage in (0, 1, 3)),
        Case("vit", 1, pieces=4, loss="siglip"),
        Case("vit", 2, loss="siglip"),
        *(Case("vit", stage, "bf16") for stage in (1, 2, 3)),
        Case("resnet", 1),
        Case("resnet", 3),
        *(Case("vit", stage, spoiled=True) for stage in range(4)),
        *(Case("vit", stage, "bf16", spoiled=True) for stage in (1, 2, 3)),
        Case("vit", 1, pieces=2, spoiled=True),
    ],
    3: [*STAGES, Case("vit", 1, loss="siglip")],  # 16 pairs: 6 rows each, the last two of them padding
    4: [Case("vit", 1), Case("vit", 3, pieces=2), Case("resnet", 1)],
}


def plain_torch(model: str, loss: str, folder: Path) -> dict:
    """The same four steps with AdamW and open_clip's loss of the kept pairs: no DeepSpeed, no ranks."""
    assert distributed.world_size() == 1
    towers = ranks_steps.build(Case(model, loss=loss), folder)
    optimizer = torch.optim.AdamW(
        parameter_groups(towers, ranks_steps.DECAY), lr=ranks_steps.LR, betas=(0.9, 0.98), eps=ranks_steps.EPS
    )
    criterion = open_clip.ClipLoss() if loss == "clip" else SigLipLoss()
    pool = CaptionPool(48, 16, backend="torch")
    images, tokens, _ = ranks_steps.problem(2)
    with torch.no_grad():
        pool.enqueue(towers(images, tokens)[0], torch.arange(len(images)))
    losses = []
    for number in range(1, 5):
        images, tokens, keep = ranks_steps.problem(number)
        image_features, text_features, *temperature = towers(images, tokens)
        if number % 3 == 2:
            value = criterion(image_features, pool.nearest(image_features)[0], *temperature)
        else:
            value = criterion(image_features[keep], text_features[keep], *temperature)
        optimizer.zero_grad(set_to_none=False)  # a matched step's text gradient is zero, not missing
        value.backward()
        norm = torch.cat([parameter.grad.flatten() for parameter in towers.parameters()]).norm()
        optimizer.step()
        pool.enqueue(text_features.detach(), torch.arange(len(images)) + number * len(images))
        losses.append(torch.stack([value.detach(), norm]))
    return {"losses": torch.stack(losses), "weights": towers.weights(), "pool": pool.features}


def close(ours: torch.Tensor, reference: torch.Tensor, atol: float) -> bool:
    """Rows of (loss, gradient norm): the loss to an absolute bound, the norm to a relative one."""
    losses, norms = (torch.stack([ours, reference]).unbind(2)[column] for column in (0, 1))
    return torch.allclose(*losses, atol=atol, rtol=0) and torch.allclose(*norms, atol=0, rtol=10 * atol)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_steps_match_plain_torch_at_each_zero_stage(ranks, tmp_path):
    run_script(ranks, HERE / "ranks_steps.py", tmp_path, *CASES[ranks])
    answers = [torch.load(tmp_path / f"{ranks}-{rank}.pt", weights_only=True) for rank in range(ranks)]
    references = {key: plain_torch(*key, tmp_path) for key in {(case.model, case.loss) for case in CASES[ranks]}}
    for case in CASES[ranks]:
        reference = references[case.model, case.loss]
        atol = {"vit": 1e-5, "resnet": 6e-4}[case.model]  # batch norm of 8 pixels magnifies rounding; a step is 1e-3
        for answer in answers:
            ours = answer[str(case)]
            if case.spoiled:
                clean = answer[str(replace(case, spoiled=False))]
                assert torch.equal(ours["losses"][:, 0], clean["losses"][:, 0]), case
                assert all(torch.equal(weight, clean["weights"][name]) for name, weight in ours["weights"].items()), (
                    case
                )
                continue
            if case.precision == "bf16":
                assert torch.allclose(ours["losses"][:, 0], reference["losses"][:, 0], rtol=0.05), case
                assert torch.allclose(ours["losses"][:, 1], reference["losses"][:, 1], rtol=0.15), case
                continue
            assert close(ours["losses"], reference["losses"], atol), case
            assert torch.allclose(ours["pool"], reference["pool"], atol=atol), case
            assert ours["weights"].keys() == reference["weights"].keys()
            for name, weight in ours["weights"].items():
                assert torch.allclose(weight, reference["weights"][name], atol=atol), (case, name)


@pytest.mark.slow
def test_resumed_steps_equal_uninterrupted_ones_at_each_zero_stage(tmp_path):
    cases = [*STAGES, Case("vit", 1, "bf16"), Case("vit", 3, "bf16", pieces=2)]
    resumed = [f"{case},resumed" for case in cases]
    run_script(2, HERE / "ranks_steps.py", tmp_path, *cases, *resumed)
    for rank in range(2):
        answers = torch.load(tmp_path / f"2-{rank}.pt", weights_only=True)
        for case in cases:
            whole, parts = answers[str(case)], answers[f"{case},resumed"]
            assert torch.equal(whole["losses"], parts["losses"]), case
            for name, weight in whole["weights"].items():
                assert torch.equal(weight, parts["weights"][name]), (case, name)


@pytest.mark.slow
def test_a_training_goes_on_with_other_ranks_and_back_at_each_zero_stage(tmp_path):
    """Steps 1 and 2 on two ranks, 3 on one, 4 on two again: the losses, weights and pool of plain torch."""
    reference = plain_torch("vit", "clip", tmp_path)
    for ranks, steps in ((2, "1-2"), (1, "3-3"), (2, "4-4")):
        cases = [f"{case},{steps}" for case in STAGES]
        run_script(ranks, HERE / "ranks_steps.py", tmp_path, *cases)
        answers = torch.load(tmp_path / f"{ranks}-0.pt", weights_only=True)
        first, last = map(int, steps.split("-"))
        for case in cases:
            ours = answers[case]
            assert close(ours["losses"], reference["losses"][first - 1 : last], 1e-5), case
            if last == 4:
                assert torch.allclose(ours["pool"], reference["pool"], atol=1e-5), case
                for name, weight in ours["weights"].items():
                    assert torch.allclose(weight, reference["weights"][name], atol=1e-5), (case, name)
