"""Run by test_kernels.py: compile both kernels for an H100, every tile that Switch-base-128 meets; no GPU is needed."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moesim.backend import kernels, triton_kernels

D, F, GROUPS = 768, 3072, 128
POINTERS = {"source_M": "*i64", "target_M": "*i64", "offsets_X1": "*i32", "slot_X": "*i32"}
NUMBERS = {"groups": "i32", "slot_stride": "i32"}
ROWS = (4, 64, 1024, 4096, 32768)


def for_hopper(function, kind_of, constants, aligned=lambda _: False, **options):
    """The function compiled; `kind_of` gives the type of an argument that is no constant, by its name."""
    types = {name: "constexpr" if name in constants else kind_of(name) for name in function.arg_names}
    place = {name: i for i, name in enumerate(function.arg_names)}
    values = {(place[name],): value for name, value in constants.items()}
    hints = {(place[name],): [["tt.divisibility", 16]] for name in types if name not in constants and aligned(name)}
    source = ASTSource(function, types, values, hints)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def kind_of(name):
    return POINTERS.get(name) or NUMBERS.get(name) or "*bf16"


def aligned(name):
    return kind_of(name) == "*bf16" or name == "slot_stride"


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
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            compiled = for_hopper(function, kind_of, constants, aligned, **options)
            assert compiled.metadata.shared <= kernels.SHARED_BYTES, (rows, columns, tile, compiled.metadata.shared)
            kind = "wgmma" if "wgmma" in compiled.asm["ptx"] else "mma"
            print(rows, columns, tile, "shared bytes", compiled.metadata.shared, kind)


if __name__ == "__main__":
    main()
