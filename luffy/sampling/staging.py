"""A buffer that two processes see: how weights go from the trainer to its vLLM child on the same device.

The buffer is exported once, and whole weights go through it part by part: the writer fills it, the reader copies it out
and says so. So there is one handle for all loads of all steps, whatever becomes of the storages that the weights are
in. (Exporting those instead leaves an open handle for each weight and load.) A weight may be larger than the buffer.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
from torch import Tensor

from ..runs import writing

CUDA_BYTES = 256 << 20
CPU_BYTES = 16 << 20


class Staging:
    """The buffer in the process that writes, or, from its handle, in the one that reads."""

    def __init__(self, device: torch.device) -> None:
        self.file = ""
        if device.type == "cuda":
            self.buffer = torch.empty(CUDA_BYTES, dtype=torch.uint8, device=device)
            self.handle = bytes(ForkingPickler.dumps(torch.multiprocessing.reductions.reduce_tensor(self.buffer)))
        else:
            descriptor, self.file = tempfile.mkstemp(prefix="luffy-weights-")
            with writing(Path(self.file)):
                try:  # with room for all of it: where there is none, writing to it would end the process
                    os.posix_fallocate(descriptor, 0, CPU_BYTES)
                except OSError:
                    self.close()
                    raise
                finally:
                    os.close(descriptor)
            self.handle = pickle.dumps(self.file)
            self.buffer = _mapped(self.file)

    @classmethod
    def opened(cls, handle: bytes) -> Staging:
        """The same memory in the process that reads."""
        self = cls.__new__(cls)
        self.handle, self.file = handle, ""
        value = pickle.loads(handle)
        if isinstance(value, str):
            self.buffer = _mapped(value)
            os.unlink(value)  # both processes have it by now
        else:
            rebuild, arguments = value
            # the writer's number of the GPU (the seventh argument) may be another one here
            self.buffer = rebuild(*arguments[:6], torch.cuda.current_device(), *arguments[7:])
        return self

    def parts(self, tensor: Tensor) -> Iterator[Tensor]:
        """A contiguous tensor as flat pieces that fit; the same ones on both sides."""
        yield from tensor.view(-1).split(self.buffer.numel() // tensor.element_size())

    def write(self, part: Tensor) -> None:
        self._of(part).copy_(part)
        self._wait()

    def read(self, part: Tensor) -> None:
        part.copy_(self._of(part))
        self._wait()

    def close(self) -> None:
        """Removes what a reader that has never come would have."""
        if self.file and os.path.exists(self.file):
            os.unlink(self.file)

    def _of(self, part: Tensor) -> Tensor:
        return self.buffer[: part.numel() * part.element_size()].view(part.dtype)

    def _wait(self) -> None:
        """The other process has a stream of its own."""
        if self.buffer.is_cuda:
            torch.cuda.current_stream(self.buffer.device).synchronize()


def _mapped(file: str) -> Tensor:
    return torch.from_file(file, shared=True, size=CPU_BYTES, dtype=torch.uint8)
