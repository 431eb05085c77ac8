"""What the router did: tokens, specs, workloads. Imports without torch."""

from moesim.traces.errors import InputError, MoesimError, PolicyError, TraceError
from moesim.traces.gates import Gates
from moesim.traces.spec import DTYPE_BYTES, ModelSpec, StackSpec, Widths
from moesim.traces.tokens import LoadTable, Phase, TokenTable, concat, concat_loads, id_dtype, load_LE, total_load_LE
from moesim.traces.workload import (
    Batch,
    StepTokens,
    Workload,
    assign_ranks,
    batches,
    held_out,
    merge_steps,
    request_lengths,
    split_loads,
    split_requests,
    step_tokens,
    vocabulary_ids,
)

__all__ = [
    "DTYPE_BYTES",
    "Batch",
    "Gates",
    "InputError",
    "LoadTable",
    "ModelSpec",
    "MoesimError",
    "Phase",
    "PolicyError",
    "StackSpec",
    "StepTokens",
    "TokenTable",
    "TraceError",
    "Widths",
    "Workload",
    "assign_ranks",
    "batches",
    "concat",
    "concat_loads",
    "held_out",
    "id_dtype",
    "load_LE",
    "merge_steps",
    "request_lengths",
    "split_loads",
    "split_requests",
    "step_tokens",
    "total_load_LE",
    "vocabulary_ids",
]
