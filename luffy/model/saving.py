"""Writing a model tensor by tensor, so that it is never whole in memory: safetensors in files of a bounded size, with
Hugging Face's names and index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_BYTES = 4 << 30
SUFFIX = ".safetensors"


class TensorFiles:
    """Tensors into `folder`/`name`.safetensors, or, where they are more than `limit` bytes together, into several files
    `name`-00001-of-00003.safetensors and so on with an index. At most `limit` bytes, or one tensor, wait in memory."""

    def __init__(
        self, folder: Path, name: str, metadata: dict[str, str] | None = None, *, limit: int = FILE_BYTES
    ) -> None:
        self.folder, self.name, self.limit = folder, name, limit
        self.metadata = {"format": "pt", **(metadata or {})}
        self.waiting: dict[str, Tensor] = {}
        self.waiting_bytes, self.total_bytes = 0, 0
        self.written: list[tuple[Path, list[str]]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy of a tensor."""
        if self.waiting and self.waiting_bytes + tensor.nbytes > self.limit:
            self._write()
        self.waiting[name] = tensor.detach().cpu().contiguous().clone()
        self.waiting_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def close(self) -> None:
        """Writes the rest, and gives the files their names, which hold their number."""
        if self.waiting or not self.written:
            self._write()
        if len(self.written) == 1:
            self.written[0][0].rename(self.folder / f"{self.name}{SUFFIX}")
            return
        where: dict[str, str] = {}
        for number, (path, names) in enumerate(self.written, 1):
            final = path.rename(self.folder / f"{self.name}-{number:05d}-of-{len(self.written):05d}{SUFFIX}")
            where |= dict.fromkeys(names, final.name)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
        (self.folder / f"{self.name}{SUFFIX}.index.json").write_text(json.dumps(index, indent=2))

    def _write(self) -> None:
        from safetensors.torch import save_file

        path = self.folder / f"{self.name}-{len(self.written) + 1:05d}{SUFFIX}"
        save_file(self.waiting, path, metadata=self.metadata)
        self.written.append((path, list(self.waiting)))
        self.waiting, self.waiting_bytes = {}, 0


def describe(model: PreTrainedModel, folder: Path) -> None:
    """Writes what Hugging Face's folders have beside the weights: the settings of model and generation."""
    settings = model.config.__class__.from_dict(model.config.to_dict())
    settings.architectures = [type(model).__name__]
    settings.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
