"""A model written tensor by tensor is the model that transformers reads."""

import pytest
import torch

from luffy.model.loading import load_model
from luffy.model.saving import TensorFiles, describe


@pytest.mark.parametrize(("limit", "count"), [(1 << 30, 1), (300_000, 8), (1, 38)], ids=["one", "some", "each"])
def test_files_of_bounded_size(tmp_path, limit, count):
    model = load_model("tiny", device="cpu")
    files, waiting = TensorFiles(tmp_path, "model", limit=limit), []
    for name, parameter in model.named_parameters():
        files.add(name, parameter)
        waiting.append(files.waiting_bytes)
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert max(waiting) <= max(limit, largest)
    files.close()
    describe(model, tmp_path)
    found = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(found) == count and found[0] == (
        "model.safetensors" if count == 1 else f"model-00001-of-{count:05d}.safetensors"
    )
    again = load_model(tmp_path, device="cpu")
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_settings_are_those_of_transformers_own_folder(tmp_path):
    model = load_model("tiny", device="cpu")
    describe(model, tmp_path)
    model.save_pretrained(tmp_path / "other")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / name).read_text() == (tmp_path / "other" / name).read_text()
