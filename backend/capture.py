"""CUDA graphs of functions over static tensors, which are plain calls where there is no CUDA.

One rule for users: graphs of one pool share their intermediate memory, so they are replayed one at a time, on one
stream, and leave their results in tensors that lie outside of it. Knows nothing about models.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from moesim.backend.cuda import new_stream
from moesim.traces import InputError

WARM_UPS = 3
"""Calls before a capture: libraries make their handles and workspaces, and kernels are compiled and tuned."""


class GraphPool:
    """Memory that the intermediates of several graphs share, given back when the last of them goes."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._graphs: WeakSet[Any] = WeakSet()

    def handle(self, graph: Any) -> Any:
        """The pool's id for a graph that is about to be captured.

        The allocator refuses the id of a pool whose graphs are all gone, so that then there is a new one.
        """
        if not self._graphs:
            self._handle = torch.cuda.graph_pool_handle()
        self._graphs.add(graph)
        return self._handle

    def discard(self, graph: Any) -> None:
        """A graph was reset: it uses the pool no more."""
        self._graphs.discard(graph)


class GraphedCall:
    """A function without arguments over static tensors: replayed as a CUDA graph, called where there is no CUDA.

    It must leave its results in tensors that exist before, and be harmless to call `WARM_UPS` times.
    """

    def __init__(
        self, body: Callable[[], None], device: torch.device, pool: GraphPool | None = None, *, graph: bool = True
    ) -> None:
        self._body: Callable[[], None] | None = body
        self._graph: Any = None
        self._pool = pool or GraphPool()
        if graph and device.type == "cuda":
            with torch.cuda.device(device):
                self._graph = _captured(body, self._pool)

    def __call__(self) -> None:
        """Run it, in the order of the current stream."""
        if self._body is None:
            raise InputError("this graph was closed")
        if self._graph is not None:
            self._graph.replay()
        else:
            with torch.no_grad():
                self._body()

    def close(self) -> None:
        """Give the graph's memory back, and what the function holds. It cannot be called any more."""
        if self._graph is not None:
            # What was launched still reads the graph's memory, which others may be given once it is reset.
            torch.cuda.synchronize()
            self._graph.reset()
            self._pool.discard(self._graph)
        self._graph = self._body = None


@torch.no_grad()
def _captured(body: Callable[[], None], pool: GraphPool) -> Any:
    """The body as a CUDA graph of the current device.

    Raises InputError where it waits for the device, which no graph can.
    """
    here = torch.cuda.current_stream()
    side = new_stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            body()
    here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    handle = pool.handle(graph)
    try:
        with torch.cuda.graph(graph, pool=handle):
            body()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # The end of a capture that has failed may fail too, and leave its stream the current one.
        torch.cuda.set_stream(here)
        recover(handle)
        raise InputError(
            f"the forward pass cannot become a CUDA graph ({_cause(error)}); the library's expert loop waits for the"
            " device: put the drop-in MoE layers into the model first"
        ) from error
    return graph


def recover(pool_handle: Any) -> None:
    """Take back what a capture that failed, on a stream that is left, has left behind in this process.

    Torch's allocator (up to 2.11) takes it for one that goes on, so that nothing can be given back to the driver and no
    other capture begins; its random numbers take no graph's replay any more until a capture has succeeded.
    """
    with suppress(RuntimeError):  # it was told that the capture is over
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool_handle)
    with suppress(RuntimeError):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.zeros(1, device="cuda")


def _cause(error: BaseException) -> str:
    """Where and why the capture failed first, in one line."""
    while error.__context__ is not None:
        error = error.__context__
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: " if frames else ""
    return place + str(error).partition("\n")[0]
