"""numba's compiler as the project uses it; only modules of kernels import this, which are imported where they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[F], F]:
    """A decorator: machine code that is kept on disk and lets other threads run; `options` are numba's."""
    return cast(Callable[[F], F], njit(**{"cache": True, "nogil": True, **options}))
