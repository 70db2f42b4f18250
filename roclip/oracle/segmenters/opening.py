"""Opens the oracle that `oracle.weights` names, for the labels of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from roclip.errors import ConfigError
from roclip.oracle.segmenters.annotations import AnnotatedSegmenter
from roclip.oracle.segmenters.base import Segmenter
from roclip.oracle.segmenters.trained import TrainedSegmenter
from roclip.oracle.segmenters.vocabulary import Relabelled

KINDS = """\
FOLDER                        a segmenter that `roclip train-segmenter` wrote
torchvision:NAME:FILE         a network of torchvision, such as deeplabv3_resnet50 or maskrcnn_resnet50_fpn
hf:FOLDER                     a segmentation model of transformers (install roclip[hf])
hf:FOLDER:CLASSIFIER          SAM's masks, each named by an image classifier of transformers
masks:PATH                    human-annotated masks: a parquet (image, mask), or a folder with images/ and masks/"""


def open_segmenter(spec: str, labels: Sequence[str], synonyms: Mapping[str, str] | None = None) -> Segmenter:
    """Open the oracle that a spec names (see `KINDS`), with its classes mapped to these labels. It loads local files only.

    Args:
        synonyms: Further names of the labels, `oracle.label_map`.

    Raises:
        ConfigError: if the spec is of no known kind, or a synonym maps to no label.
        CheckpointError: if the weights are missing, altered, unsafe or of another model.
        DataError: if the oracle has a class for none of the labels.
    """
    kind, _, rest = spec.partition(":")
    if kind == "masks" and rest:
        return AnnotatedSegmenter(Path(rest), labels, synonyms)
    segmenter = _network(spec, kind, rest, labels)
    same = segmenter.labels == tuple(labels)
    return segmenter if same else Relabelled(segmenter, labels, synonyms)


def _network(spec: str, kind: str, rest: str, labels: Sequence[str]) -> Segmenter:
    first, _, second = rest.partition(":")
    if kind == "torchvision" and first and second:
        from roclip.oracle.segmenters.torchvision_net import TorchvisionSegmenter

        return TorchvisionSegmenter(first, Path(second))
    if kind == "hf" and first:
        from roclip.oracle.segmenters.transformers_net import open_hf

        return open_hf(Path(first), labels, Path(second) if second else None)
    if Path(spec).is_dir():
        return TrainedSegmenter.load(Path(spec))
    raise ConfigError(f"oracle.weights: expected one of the kinds below, got {spec!r}.\n{KINDS}")
