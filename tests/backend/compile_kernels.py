"""Run by test_kernels.py: compile both kernels for an H100, every tile that Switch-base-128 meets; no GPU is needed."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moesim.backend import kernels, triton_kernels

D, F, GROUPS = 768, 3072, 128
POINTERS = {"source_M": "*i64", "target_M": "*i64", "offsets_X1": "*i32", "slot_X": "*i32"}
NUMBERS = {"groups": "i32", "slot_stride": "i32"}
ROWS = (4, 64, 1024, 4096, 32768)


def compile_one(function, constants, tile):
    types = {}
    for name in function.arg_names:
        types[name] = "constexpr" if name in constants else POINTERS.get(name) or NUMBERS.get(name) or "*bf16"
    place = {name: i for i, name in enumerate(function.arg_names)}
    aligned = {
        (place[name],): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind == "*bf16" or name == "slot_stride"
    }
    source = ASTSource(function, types, {(place[name],): value for name, value in constants.items()}, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def main():
    for rows in ROWS:
        for function, columns, extra in (
            (triton_kernels.up, F, {"GATED": False, "ACTIVATION": "relu"}),
            *([(triton_kernels.up, F, {"GATED": True, "ACTIVATION": "silu"})] if rows == ROWS[-1] else []),
            (triton_kernels.down, D, {"SCALED": True}),
        ):
            tile = kernels.tile_of(rows, GROUPS, columns, matrices=1 + extra.get("GATED", False))
            constants = {
                "D": D,
                "F": F,
                "GROUPS": GROUPS,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "DEPTH": tile.depth,
                "PRECISION": "tf32",
                **extra,
            }
            compiled = compile_one(function, constants, tile)
            assert compiled.metadata.shared <= kernels.SHARED_BYTES, (rows, columns, tile, compiled.metadata.shared)
            kind = "wgmma" if "wgmma" in compiled.asm["ptx"] else "mma"
            print(rows, columns, tile, "shared bytes", compiled.metadata.shared, kind)


if __name__ == "__main__":
    main()
