"""Small arrays between host and device, once a layer, without making either wait for more than they must.

Shape letters: X numbers of one message.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.backend.cuda import new_event

DEPTH = 16
"""Messages to the device that may be under way."""


class Uploads:
    """Int32 messages of at most `width` numbers to a device, and of any size back; on a CPU they are the arrays
    themselves.

    Pinned memory is used again when its message has been read, which an event tells.
    """

    def __init__(self, device: torch.device, width: int) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._turn = 0
        if self._on_gpu:
            self._sent = [torch.empty(width, dtype=torch.int32, pin_memory=True) for _ in range(DEPTH)]
            self._done = [new_event(timed=False) for _ in range(DEPTH)]
            self._told = torch.empty(width, dtype=torch.int32, pin_memory=True)
            self._came = new_event(timed=False)

    def send(self, numbers_X: NDArray[np.int32]) -> torch.Tensor:
        """[X] on the device, in the order of the current stream."""
        if not self._on_gpu:
            return torch.from_numpy(numbers_X.copy())
        self._turn = (self._turn + 1) % DEPTH
        pinned, done = self._sent[self._turn], self._done[self._turn]
        done.synchronize()
        pinned.numpy()[: len(numbers_X)] = numbers_X
        there_X = pinned[: len(numbers_X)].to(self._device, non_blocking=True)
        done.record()
        return there_X

    def read(self, numbers_X: torch.Tensor, meanwhile: Callable[[], None]) -> NDArray[np.int32]:
        """[X] on the host, once the current stream has come to it; `meanwhile` is called until then."""
        if not self._on_gpu:
            return np.asarray(numbers_X.numpy())
        if len(self._told) < len(numbers_X):
            with torch.inference_mode(False):  # it is written again, whatever the mode then
                self._told = torch.empty(len(numbers_X), dtype=torch.int32, pin_memory=True)
        pinned = self._told[: len(numbers_X)]
        pinned.copy_(numbers_X, non_blocking=True)
        self.wait(meanwhile)
        return pinned.numpy().copy()

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Until the current stream has done what it was given; `meanwhile` is called until then."""
        if self._on_gpu:
            self._came.record()
            while not self._came.query():
                meanwhile()
