"""Oracles of transformers: real classes with random weights, saved to a folder and read from there alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from roclip.errors import CheckpointError, ConfigError
from roclip.oracle.segmenters.opening import open_segmenter

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and what it loads warn of their own future
NAMES = {0: "wall", 1: "couch", 2: "tv"}


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, 48, 48, 3), dtype=np.uint8)


def names(config) -> dict:
    return {"id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}, **config}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of CLIP that spells."""
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = folder / "vocabulary.json"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        **names(
            {
                "backbone_config": backbone,
                "hidden_dim": 32,
                "feature_size": 32,
                "mask_feature_size": 32,
                "num_queries": 4,
                "num_attention_heads": 2,
                "encoder_layers": 1,
                "decoder_layers": 2,
                "dim_feedforward": 16,
                "encoder_feedforward_dim": 16,
            }
        )
    )
    folder = tmp_path_factory.mktemp("mask2former")
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_universal_model_sees_its_classes_under_the_labels_of_a_run(mask2former: Path):
    segmenter = open_segmenter(f"hf:{mask2former}", ["sofa", "tv", "unicorn"], {"couch": "sofa"})
    areas = segmenter.areas(pixels(5))
    assert areas.shape == (5, 3)
    assert (areas[:, :2] > 0).all()
    assert (areas.sum(axis=1) <= 1 + 1e-5).all()
    assert segmenter.masks(pixels(2)).shape == (2, 48, 48)
    assert not segmenter.covers("unicorn")
    assert segmenter.info["independent_of_clip"]
    assert np.allclose(areas[4:], segmenter.areas(pixels(5)[4:]), atol=1e-5)


def test_oneformer_is_told_its_task(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocabulary.json"), str(tmp_path / "merges.txt"))
    backbone = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.OneFormerConfig(
        **names({"backbone_config": backbone, "hidden_dim": 32, "conv_dim": 32, "mask_dim": 32, "num_queries": 4}),
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        query_dec_layers=1,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
        task_seq_len=12,
    )
    transformers.OneFormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    size = {"height": 64, "width": 64}
    transformers.OneFormerImageProcessor(size=size, class_info_file=None).save_pretrained(tmp_path)
    areas = open_segmenter(f"hf:{tmp_path}", ["couch", "tv"]).areas(pixels(2))
    assert areas.shape == (2, 2)
    assert (areas > 0).all()


def test_semantic_model_is_read(tmp_path: Path):
    config = transformers.SegformerConfig(
        **names({"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8})
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    transformers.SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    areas = open_segmenter(f"hf:{tmp_path}", ["couch", "tv"]).areas(pixels(2))
    assert areas.shape == (2, 2)
    assert (areas > 0).all()


def test_clipseg_is_asked_for_the_labels_and_is_no_independent_scorer(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocabulary.json"), str(tmp_path / "merges.txt"))
    text = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPSegConfig(
        text_config={**text, "num_attention_heads": 2, "eos_token_id": 1, "bos_token_id": 0},
        vision_config={**sizes, "num_attention_heads": 2},
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    transformers.CLIPSegForImageSegmentation(config).save_pretrained(tmp_path)
    image_processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    transformers.CLIPSegProcessor(image_processor, tokenizer).save_pretrained(tmp_path)
    segmenter = open_segmenter(f"hf:{tmp_path}", ["cat", "dog"])
    assert segmenter.areas(pixels(3)).shape == (3, 2)
    assert not segmenter.info["independent_of_clip"]
    assert open_segmenter(f"hf:{tmp_path}", ["cat"]).areas(pixels(1)).shape == (1, 1)


def test_sam_masks_are_named_by_a_classifier(tmp_path: Path):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    config = transformers.SamConfig(
        vision_config={
            **small,
            "image_size": 64,
            "patch_size": 16,
            "output_channels": 16,
            "num_pos_feats": 8,
            "global_attn_indexes": [0],
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )
    net = transformers.SamModel(config)
    last = net.mask_decoder.iou_prediction_head
    torch.nn.init.constant_(last.proj_out.bias, 5.0)  # sure of every mask
    net.save_pretrained(tmp_path / "sam")
    processor = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    transformers.SamProcessor(processor).save_pretrained(tmp_path / "sam")
    vit = transformers.ViTConfig(
        **names({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}),
        image_size=32,
        patch_size=16,
    )
    classifier = transformers.ViTForImageClassification(vit)
    torch.nn.init.constant_(classifier.classifier.bias, 0.0)
    classifier.classifier.bias.data[2] = 20.0  # every crop is a tv
    classifier.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError, match="SAM has no class names"):
        open_segmenter(f"hf:{tmp_path / 'sam'}", ["tv"])
    segmenter = open_segmenter(f"hf:{tmp_path / 'sam'}:{tmp_path / 'vit'}", ["tv", "sofa"], {"couch": "sofa"})
    areas = segmenter.areas(pixels(1))
    assert areas[0, 0] > 0
    assert areas[0, 1] == 0


def test_folder_without_safetensors_is_refused(mask2former: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((mask2former / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="A pickle is refused"):
        open_segmenter(f"hf:{tmp_path}", ["tv"])
    with pytest.raises(CheckpointError, match=r"config\.json: expected a model of transformers"):
        open_segmenter(f"hf:{tmp_path / 'none'}", ["tv"])
