"""Run by test_routing_kernels.py: compile the routing kernels for an H100 as they are called; no GPU is needed."""

from compile_kernels import for_hopper

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
        for_hopper(getattr(triton_routing, name), lambda arg, known=pointers: known.get(arg, "i32"), constants)
        print(name)


if __name__ == "__main__":
    main()
