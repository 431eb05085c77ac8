"""numba's compiler as the project uses it; only modules of kernels import this, which are imported where they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[F], F]:
    """A decorator: machine code that is kept on disk and lets other threads run; `options` are numba's."""
    return cast(Callable[[F], F], njit(**{"cache": True, "nogil": True, **options}))


def _prefetch(_: Any, array: Any) -> Any:
    """In compiled code: begin to read where `array` begins, one line of the cache, and wait for nothing."""

    def emitted(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [at.type, number, number, number])
        read, near, data = number(0), number(3), number(1)
        builder.call(builder.module.declare_intrinsic("llvm.prefetch", [at.type], kind), [at, read, near, data])
        return context.get_dummy_value()

    return types.void(array), emitted


prefetch = cast(Callable[[Any], None], intrinsic(_prefetch))
