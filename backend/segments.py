"""A forward pass in segments: what lies between two MoE layers is one CUDA graph, what the host decides lies between.

Where experts come and go the host has to look at every router's choice, so a pass cannot be one graph; its dense parts
can. On a CPU the same pass is called directly. Knows nothing about models. Shape letters: N tokens, D = d_model, L
cuts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from moesim.backend.capture import WARM_UPS, recover
from moesim.backend.cuda import new_stream

T = TypeVar("T")
Cut = Callable[[int, T], torch.Tensor]
"""(which cut, what the pass knows there) -> [N, D] what it goes on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment(Generic[T]):
    graph: Any
    known: T
    """At the cut where it ends; static tensors."""
    out_ND: torch.Tensor
    """What the next segment reads."""


class Segments(Generic[T]):
    """`run(cut)` in graphs between its cuts, where there is CUDA and `graph` asks for it.

    The pass reads and leaves static tensors, is harmless to run WARM_UPS times, makes the same cuts every time, and
    never waits for the device. `like`: what every cut gives back looks like, [N, D]. Graphs share their memory and
    are replayed in order, on one stream.
    """

    def __init__(self, run: Callable[[Cut[T]], None], like: torch.Tensor, *, graph: bool = True) -> None:
        self._run, self._like = run, like
        self._segments: list[_Segment[T]] = []
        self._last: Any = None
        if graph and like.device.type == "cuda":
            with torch.cuda.device(like.device), torch.inference_mode():
                pool: Any = torch.cuda.graph_pool_handle()
                try:
                    self._capture(pool)
                except RuntimeError:
                    recover(pool)
                    raise

    @torch.inference_mode()
    def __call__(self, between: Cut[T]) -> None:
        """Run it; `between` is called at every cut."""
        if self._last is None:
            self._run(between)
            return
        for number, segment in enumerate(self._segments):
            segment.graph.replay()
            segment.out_ND.copy_(between(number, segment.known))
        self._last.replay()

    def close(self) -> None:
        """Give the graphs' memory back."""
        if self._last is not None:
            torch.cuda.synchronize()
            for graph in [*(segment.graph for segment in self._segments), self._last]:
                graph.reset()
            self._segments, self._last = [], None

    def _capture(self, pool: Any) -> None:
        here, side = torch.cuda.current_stream(), new_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._run(lambda _number, _known: torch.zeros_like(self._like))
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
            outs: list[torch.Tensor] = []

            def make(_number: int, _known: T) -> torch.Tensor:
                outs.append(torch.zeros_like(self._like))
                return outs[-1]

            self._run(make)
            graph: Any = None

            def begin() -> None:
                nonlocal graph
                graph = torch.cuda.CUDAGraph()
                with torch.inference_mode(False):  # torch keeps what this makes for all captures, whatever their mode
                    # Others' threads may use the device meanwhile.
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")

            def cut(number: int, known: T) -> torch.Tensor:
                graph.capture_end()
                self._segments.append(_Segment(graph=graph, known=known, out_ND=outs[number]))
                begin()
                return outs[number]

            begin()
            try:
                self._run(cut)
            finally:
                graph.capture_end()
            self._last = graph
        here.wait_stream(side)
