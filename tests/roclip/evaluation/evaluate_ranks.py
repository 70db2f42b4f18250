"""Run on each rank from test_evaluate.py: all ranks evaluate together, in the middle of a training."""

import sys
from pathlib import Path

import torch

from roclip import distributed
from roclip.checkpoint.pointers import Cursor
from roclip.config import load_config
from roclip.evaluation.evaluate import record_evaluation
from roclip.model.towers import Towers
from roclip.training.engine import build_engine
from roclip.training.losses import clip_loss


def main(run: Path, arm: str, zero_stage: int) -> None:
    torch.distributed.init_process_group("gloo")
    config = load_config(run / "preset.yaml", [f"train.zero_stage={zero_stage}"])
    torch.manual_seed(0)
    towers = Towers("tiny", run / "models" / "tiny.json")
    engine = build_engine(towers, config.train)
    towers.eval()
    record_evaluation(config, run, arm, towers, Cursor(10, 1, 10, 0, "plain"))
    towers.train()
    generator = torch.Generator().manual_seed(distributed.rank())
    pixels = torch.rand(4, 3, 64, 64, generator=generator)
    tokens = towers.tokenize(["one", "two", "three", "four"])
    image_features, text_features, logit_scale = engine(pixels, tokens)[:3]  # training goes on after an evaluation
    engine.backward(clip_loss(image_features, text_features, logit_scale))
    engine.step()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
