"""Run on each rank from test_ranks.py and test_accumulate.py: a few training steps, saved for the test to compare.

ranks_steps.py FOLDER CASE…    with CASE = model,zero_stage,precision,pieces,loss[,resumed | ,spoiled | ,FIRST-LAST]
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from roclip import distributed
from roclip.checkpoint import checkpoint
from roclip.checkpoint.checkpoint import Cursor
from roclip.config import ModelConfig, TrainConfig, environment_defaults
from roclip.data.stream import rows_of_rank
from roclip.defence.pool import CaptionPool
from roclip.model.towers import Towers
from roclip.training import accumulate
from roclip.training.engine import build_engine, gradient_norm, leave_out, step
from roclip.training.losses import LOSSES

TEXT = '{"context_length": 12, "vocab_size": 128, "width": 32, "heads": 2, "layers": 2}'
MODELS = {
    "vit": f"""{{"embed_dim": 16, "text_cfg": {TEXT},
        "vision_cfg": {{"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}}}}""",
    "resnet": f"""{{"embed_dim": 16, "text_cfg": {TEXT},
        "vision_cfg": {{"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}}}""",
}
GLOBAL_BATCH = 16
LR, DECAY, EPS = 1e-3, 0.1, 1e-4  # a large eps: Adam turns rounding of gradients that are zero into whole steps


@dataclass(frozen=True)
class Case:
    model: str
    zero_stage: int = 0
    precision: str = "fp32"
    pieces: int = 1
    loss: str = "clip"
    resumed: bool = False
    """Whether the last two steps are made by a second engine, from the checkpoint of the first."""
    spoiled: bool = False
    """Whether each step comes after one of other data and of great gradients that is left out."""
    steps: tuple[int, int] | None = None
    """Only these, first and last: from the checkpoint that the step before left, and with one at the end."""

    @classmethod
    def parse(cls, text: str) -> "Case":
        model, stage, precision, pieces, loss, *how = text.split(",")
        first, dash, last = how[0].partition("-") if how else ("", "", "")
        steps = (int(first), int(last)) if dash else None
        return cls(model, int(stage), precision, int(pieces), loss, "resumed" in how, "spoiled" in how, steps)

    def __str__(self) -> str:
        text = f"{self.model},{self.zero_stage},{self.precision},{self.pieces},{self.loss}"
        return text + ",resumed" * self.resumed + ",spoiled" * self.spoiled


def build(case: Case, folder: Path, **options) -> Towers:
    """The same towers on each rank and each call."""
    file = folder / f"tiny-{case.model}.json"
    if distributed.rank() == 0:
        file.write_text(MODELS[case.model])
    distributed.barrier()
    torch.manual_seed(0)
    towers = Towers(file.stem, file, options=ModelConfig(**options), loss=case.loss)
    with torch.no_grad():
        for name, weight in towers.clip.named_parameters():
            if name.endswith("bn3.weight"):  # zero at the start: no gradient would reach the layers before
                weight.fill_(0.5)
    return towers.train()


def problem(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """One global batch: images, tokens, keep."""
    generator = torch.Generator().manual_seed(number)
    images = torch.rand(GLOBAL_BATCH, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    tokens = torch.randint(1, 100, (GLOBAL_BATCH, 12), generator=generator)
    tokens[:, -1] = 127  # the end of text is the largest
    return images, tokens, torch.rand(GLOBAL_BATCH, generator=generator) > 0.2


def local(value: Tensor) -> Tensor:
    return value[own_rows() % GLOBAL_BATCH]


def own_rows() -> Tensor:
    """Numbers of this rank's rows; those from the global batch on are padding."""
    rows = rows_of_rank(GLOBAL_BATCH, distributed.world_size())
    return distributed.rank() * rows + torch.arange(rows)


def losses_of(engine, towers: Towers, case: Case, pool: CaptionPool, steps: range) -> list[Tensor]:
    """Train: step 2 of each 3 is matched, the others are plain and leave pairs out. (loss, gradient norm) of each."""
    losses, valid = [], own_rows() < GLOBAL_BATCH
    for number in steps:
        images, tokens, keep = (local(value) for value in problem(number))
        matched = number % 3 == 2
        if case.spoiled:
            (image_features, text_features, *_), backward = accumulate.forward(
                engine, 1 - images, tokens, pieces=case.pieces, text_gradient=matched
            )
            backward((1e3 * image_features * text_features.detach()).sum())
            leave_out(engine, towers)
        (image_features, text_features, *temperature), backward = accumulate.forward(
            engine, images, tokens, pieces=case.pieces, text_gradient=not matched
        )
        targets = pool.nearest(image_features)[0] if matched else text_features
        loss = LOSSES[case.loss](image_features, targets, *temperature, keep=valid if matched else valid & keep)
        backward(loss)
        norm = gradient_norm(engine)
        step(engine, towers)
        ids = local(torch.arange(GLOBAL_BATCH)) + number * GLOBAL_BATCH
        pool.enqueue(text_features.detach(), ids, valid=valid)
        losses.append(torch.stack([distributed.all_sum(loss) / distributed.world_size(), norm]))
    return losses


def settings(case: Case) -> TrainConfig:
    return TrainConfig(
        global_batch_size=GLOBAL_BATCH,
        lr=LR,
        weight_decay=DECAY,
        eps=EPS,
        zero_stage=case.zero_stage,
        precision=case.precision,
        grad_accum_steps=case.pieces,
        loss=case.loss,
    )


def solve(case: Case, folder: Path) -> dict:
    """Losses and weights of four steps, or of some of them, and what the pool holds."""
    towers, engine, pool = start(case, folder)
    if case.steps:
        first, last = case.steps
        checkpoints = folder / f"{case.model}-{case.zero_stage}-{case.precision}"
        if first > 1:
            assert checkpoint.resume(checkpoints, engine, towers, {"pool": pool})
        losses = losses_of(engine, towers, case, pool, range(first, last + 1))
        save(checkpoints, engine, towers, pool, last)
        return {"losses": torch.stack(losses), "weights": towers.weights(), "pool": pool.features}
    losses = losses_of(engine, towers, case, pool, range(1, 3))
    if case.resumed:
        save(folder / str(case), engine, towers, pool, 2)
        towers, engine, pool = start(case, folder)
        checkpoint.resume(folder / str(case), engine, towers, {"pool": pool})
    losses += losses_of(engine, towers, case, pool, range(3, 5))
    return {"losses": torch.stack(losses), "weights": towers.weights(), "pool": pool.features}


def save(folder: Path, engine, towers: Towers, pool: CaptionPool, step: int) -> None:
    writer = checkpoint.Writer(folder, keep=1)
    writer.save(engine, towers, {"pool": pool}, Cursor(step, 1, step, step * GLOBAL_BATCH, "plain"))
    writer.wait()


def start(case: Case, folder: Path) -> tuple:
    towers = build(case, folder)
    engine = build_engine(towers, settings(case))
    pool = CaptionPool(48, 16)
    with torch.no_grad():  # so that the images of the matched step find different captions
        images, tokens, _ = (local(value) for value in problem(2))
        pool.enqueue(engine(images, tokens)[0], local(torch.arange(GLOBAL_BATCH)), valid=own_rows() < GLOBAL_BATCH)
    return towers, engine, pool


if __name__ == "__main__":
    environment_defaults()
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    answers = {text: solve(Case.parse(text), out) for text in sys.argv[2:]}
    torch.save(answers, out / f"{distributed.world_size()}-{distributed.rank()}.pt")
    torch.distributed.destroy_process_group()
