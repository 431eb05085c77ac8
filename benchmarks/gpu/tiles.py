"""Which tile suits which batch: every reasonable tile of both Triton kernels, Switch-base-128's shapes, bfloat16.

    python benchmarks/gpu/tiles.py --out tiles.json            # two minutes on a GPU, most of them compiling
    TRITON_INTERPRET=1 python benchmarks/gpu/tiles.py --out tiles.json --device cpu --tokens 8     # a rehearsal

`backend/kernels.tile_of` was written from arithmetic; this measures it. Each tile is timed as a CUDA graph over the
weights of six layers, so that no cache holds them. Printed: the fastest ones and the one that is used.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timing import environment, median_s

from moesim.backend import kernels
from moesim.backend.capture import GraphedCall
from moesim.backend.grouped import Groups, SlotWeights, group_pairs

BATCHES = (1, 16, 64, 1024, 4096, 32768)
ZIPF = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Of the experts that are timed."""

    d_model: int
    d_ff: int
    experts: int
    layers: int


SHAPES = {
    "cuda": Shapes(d_model=768, d_ff=3072, experts=128, layers=6),
    "cpu": Shapes(d_model=64, d_ff=128, experts=4, layers=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=list(SHAPES), default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=BATCHES)
    options = parser.parse_args()
    device, shapes = torch.device(options.device), SHAPES[options.device]
    found: dict[str, Any] = {"environment": environment(options.device), "shapes": asdict(shapes), "tokens": {}}
    params = 2 * shapes.d_model * shapes.d_ff
    rows_LEP = 0.03 * torch.randn((shapes.layers, shapes.experts, params), device=device).bfloat16()
    sizes: dict[str, Any] = {"d_model": shapes.d_model, "d_ff": shapes.d_ff, "activation": "relu", "gated": False}
    layers = [SlotWeights.of_rows(rows_EP, **sizes) for rows_EP in rows_LEP]
    for tokens in options.tokens:
        found["tokens"][tokens] = both(tokens, layers, shapes, device)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def both(tokens: int, layers: list[SlotWeights], shapes: Shapes, device: torch.device) -> dict[str, Any]:
    """All tiles of both products at one batch size."""
    share_E = 1 / torch.arange(1, shapes.experts + 1, device=device) ** ZIPF
    groups = group_pairs(torch.multinomial(share_E, tokens, replacement=True), shapes.experts)
    x_ND, h_MF = (torch.randn((tokens, n), device=device).bfloat16() for n in (shapes.d_model, shapes.d_ff))
    scale_M, out_MD = torch.rand(tokens, device=device).bfloat16(), torch.zeros_like(x_ND)
    bounds = groups.offsets_X1, groups.slot_X

    def up(tile: kernels.Tile) -> None:
        for w in layers:
            kernels.grouped_up(
                x_ND, groups.order_M, *bounds, w.up_SFD, activation=w.activation, gated=w.gated, tile=tile
            )

    def down(tile: kernels.Tile) -> None:
        for w in layers:
            kernels.grouped_down(h_MF, groups.order_M, scale_M, *bounds, w.down_SDF, out_MD, tile=tile)

    return {
        "up": timed(up, tokens, shapes.d_ff, groups, device, len(layers)),
        "down": timed(down, tokens, shapes.d_model, groups, device, len(layers)),
    }


def timed(
    product: Callable[[kernels.Tile], None],
    tokens: int,
    columns: int,
    groups: Groups,
    device: torch.device,
    layers: int,
) -> list[dict[str, Any]]:
    """Every candidate, the fastest first; what cannot run says why."""
    experts = len(groups.slot_X)
    used, found = kernels.tile_of(tokens, experts, columns), []
    for tile in dict.fromkeys([used, *candidates(tokens, experts, columns)]):
        told: dict[str, Any] = {**asdict(tile), "used": tile == used, "layer_s": None}
        try:
            call = GraphedCall(lambda tile=tile: product(tile), device)
            told["layer_s"] = median_s(call, device).median_s / layers
            call.close()
        except Exception as error:  # a tile that does not compile stops no other
            told["error"] = " ".join(str(error).split())[:200]
        found.append(told)
    found.sort(key=lambda one: one["layer_s"] or float("inf"))
    for one in [*found[:3], *(one for one in found[3:] if one["used"])]:
        took = "failed" if one["layer_s"] is None else f"{1e6 * one['layer_s']:.1f} us"
        tile_text = " ".join(f"{name} {one[name]}" for name in ("rows", "columns", "depth", "warps", "stages"))
        print(f"{tokens} tokens, {columns} columns: {tile_text}: {took}{' (used)' if one['used'] else ''}", flush=True)
    return found


def candidates(tokens: int, experts: int, columns: int) -> list[kernels.Tile]:
    """Tiles worth a try at so many tokens for each expert."""
    mean = tokens / min(experts, tokens)
    rows = (16,) if mean <= 8 else (16, 32, 64) if mean <= 48 else (64, 128)
    across = (16, 32, 64, 128) if mean <= 8 else (64, 128, 256)
    depths, warps = ((128, 256), (4,)) if mean <= 8 else ((64, 128), (4, 8))
    made = itertools.product(rows, across, depths, warps, (4, 3))
    tiles = [kernels.Tile(rows=r, columns=c, depth=d, warps=w, stages=s) for r, c, d, w, s in made]
    deepest: dict[tuple[int, ...], kernels.Tile] = {}
    for tile in tiles:
        if fits(tile) and columns % tile.columns == 0:
            deepest.setdefault((tile.rows, tile.columns, tile.depth, tile.warps), tile)
    return list(deepest.values())


def fits(tile: kernels.Tile) -> bool:
    """Within shared memory, a few hundred numbers a thread, and not so small that warps have nothing to do."""
    needed = tile.shared_bytes(itemsize=2, matrices=1)
    numbers = tile.rows * tile.columns / (32 * tile.warps)
    return needed <= kernels.SHARED_BYTES and 4 <= numbers <= 128 and needed >= 8192 * tile.stages


if __name__ == "__main__":
    main()
