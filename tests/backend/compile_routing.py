"""Run by test_routing_kernels.py: compile the routing kernels for an H100 as they are called; no GPU is needed."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moesim.backend import triton_routing

CALLS = [
    ("choose", {"logits_ME": "*fp32", "ids_M": "*u8", "prob_M": "*bf16"}, {"EXPERTS": 128, "ROWS": 16}),
    ("choose", {"logits_ME": "*fp32", "ids_M": "*i32", "prob_M": "*fp16"}, {"EXPERTS": 512, "ROWS": 4}),
    ("drop", {"ids_BS": "*u8", "out_BS": "*u8"}, {"ROWS": 64}),
    ("group", {"ids_M": "*i64", "order_M": "*i64", "offsets_X1": "*i32"}, {"ROWS": 64}),
    ("group", {"ids_M": "*u8", "order_M": "*i64", "offsets_X1": "*i32"}, {"ROWS": 64, "experts": 1}),
]


def main():
    for name, pointers, constants in CALLS:
        function = getattr(triton_routing, name)
        types = {arg: "constexpr" if arg in constants else pointers.get(arg, "i32") for arg in function.arg_names}
        place = {arg: i for i, arg in enumerate(function.arg_names)}
        source = ASTSource(function, types, {(place[arg],): value for arg, value in constants.items()})
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print(name)


if __name__ == "__main__":
    main()
