"""What the router did: tokens, specs, batching. Imports without torch."""

from moesim.traces.batching import (
    Batch,
    StepTokens,
    assign_ranks,
    batches,
    held_out,
    split_requests,
    step_tokens,
    vocabulary_ids,
)
from moesim.traces.errors import InputError, MoesimError, PolicyError, TraceError
from moesim.traces.spec import DTYPE_BYTES, ModelSpec, StackSpec, Widths
from moesim.traces.tokens import LoadTable, Phase, TokenTable, concat, concat_loads, id_dtype, load_LE

__all__ = [
    "DTYPE_BYTES",
    "Batch",
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
    "assign_ranks",
    "batches",
    "concat",
    "concat_loads",
    "held_out",
    "id_dtype",
    "load_LE",
    "split_requests",
    "step_tokens",
    "vocabulary_ids",
]
