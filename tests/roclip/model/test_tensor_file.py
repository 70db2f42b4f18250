import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from roclip.model import tensor_file
from roclip.model.tensor_file import write_tensors

TENSORS = {
    "weight": torch.rand(300, 500),
    "scale": torch.tensor(3.0),
    "ids": torch.arange(7),
    "nothing": torch.zeros(0, 4),
    "half": torch.rand(20, 10).to(torch.bfloat16),
    "mask": torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("piece", [4096, 1 << 22])
def test_file_is_that_of_safetensors_byte_for_byte(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tensor_file, "_PIECE", piece)
    sha256 = write_tensors(tmp_path / "ours", TENSORS, {"format": "pt"})
    save_file(TENSORS, tmp_path / "theirs", {"format": "pt"})
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert sha256 == hashlib.sha256(ours).hexdigest()
    assert all(torch.equal(value, load_file(tmp_path / "ours")[name]) for name, value in TENSORS.items())
