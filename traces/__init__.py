"""What the router did: tokens, specs, batching. Imports without torch."""

from moesim.traces.batching import Batch, StepTokens, assign_ranks, batches, held_out, split_requests
from moesim.traces.errors import InputError, MoesimError, PolicyError, TraceError
from moesim.traces.spec import DTYPE_BYTES, ModelSpec, StackSpec
from moesim.traces.tokens import Phase, TokenTable, concat, id_dtype, load_LE

__all__ = [
    "DTYPE_BYTES",
    "Batch",
    "InputError",
    "ModelSpec",
    "MoesimError",
    "Phase",
    "PolicyError",
    "StackSpec",
    "StepTokens",
    "TokenTable",
    "TraceError",
    "assign_ranks",
    "batches",
    "concat",
    "held_out",
    "id_dtype",
    "load_LE",
    "split_requests",
]
