"""One GPU as several: disjoint groups of its multiprocessors (SMs), each with a stream whose kernels run there only.

CUDA's green contexts do it. The device's SMs are split once for all groups, since only groups of one split are sure to
be disjoint. The SMs that are left over, if any, carry the copies, so that these take no SM from any group. Where driver
or package lack green contexts, plain streams stand in, which share all SMs, and `Groups.kind` says so and why. Knows
nothing about experts. Sources: the CUDA driver API, section on green contexts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from moesim.backend import kernels, routing_kernels
from moesim.backend.cuda import new_event, new_stream, stream_of
from moesim.traces import MoesimError

SM_GROUPS = "sm-groups"
SHARED_STREAMS = "streams"
CPU_THREADS = "cpu threads"
IGNORE_COSCHEDULING = 1
"""CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING."""


class GreenContextError(MoesimError):
    """The driver refuses, or there are not enough multiprocessors; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The streams of G partitions of one device. `close` when nothing runs on them any more."""

    kind: str
    """SM_GROUPS, SHARED_STREAMS with the reason, or CPU_THREADS."""
    sms: tuple[int, ...]
    """Multiprocessors of each group; empty where the groups share them, or on a CPU."""
    copy_sms: int = 0
    """Multiprocessors that only copies use; 0: copies run wherever there is room."""
    streams: tuple[torch.cuda.Stream, ...] = ()
    """[G] for kernels; empty on a CPU."""
    copy_streams: tuple[torch.cuda.Stream, ...] = ()
    """[G] for copies into each partition; empty on a CPU."""
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def describe(self) -> dict[str, Any]:
        """For results, JSON types."""
        return {"partitions": self.kind, "sms": list(self.sms), "copy_sms": self.copy_sms}

    def close(self) -> None:
        """Destroy streams and contexts; the caller has synchronised the device. What cannot be destroyed goes with the
        process."""
        while self._undo:
            with suppress(GreenContextError):
                self._undo.pop()()


def prepare() -> None:
    """Let every stream have a hardware queue of its own: with the default of 8, streams that share one wait for each
    other. Has an effect only before the process first uses CUDA, so whoever starts it calls this first."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def split(device: torch.device, count: int) -> Groups:
    """`count` partitions of `device`; on a CPU threads take the streams' place.

    Never raises for what the driver cannot do: the streams are plain ones then, and `kind` has the reason.
    """
    if device.type != "cuda":
        return Groups(kind=CPU_THREADS, sms=())
    try:
        return _sm_groups(device, count)
    except GreenContextError as error:
        streams = _plain(device, 2 * count)
        return Groups(kind=f"{SHARED_STREAMS}: {error}", sms=(), streams=streams[:count], copy_streams=streams[count:])


def group_size(total: int, count: int, smallest: int, step: int) -> int:
    """Multiprocessors of each of `count` equal groups: as many as fit, whole steps. Raises GreenContextError."""
    size = total // count // step * step
    if size < smallest:
        raise GreenContextError(
            f"{total} multiprocessors are too few for {count} groups of at least {smallest} in steps of {step}"
        )
    return size


def _sm_groups(device: torch.device, count: int) -> Groups:
    """See `split`. Raises GreenContextError with the reason."""
    driver = _driver()
    # torch makes the primary context current, which all green contexts of a device belong to.
    torch.cuda.synchronize(device)
    cu_device = _checked(driver, "cuDeviceGet", _index(device))
    whole = _checked(driver, "cuDeviceGetDevResource", cu_device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
    major, _ = torch.cuda.get_device_capability(device)
    smallest, step = (8, 8) if major >= 9 else (4, 2)
    largest = group_size(int(whole.sm.smCount), count, smallest, step)
    parts, rest = _divided(driver, whole, count, range(largest, smallest - 1, -step))
    undo: list[Callable[[], None]] = []
    try:
        streams = tuple(_streams(driver, device, cu_device, part, 1, undo)[0] for part in parts)
        _try(device, streams)
        copy_sms = int(rest.sm.smCount)
        copy_streams, copy_sms = _copy_streams(driver, device, cu_device, rest if copy_sms else None, count, undo)
    except GreenContextError:
        while undo:
            undo.pop()()
        raise
    return Groups(
        kind=SM_GROUPS,
        sms=tuple(int(part.sm.smCount) for part in parts),
        copy_sms=copy_sms,
        streams=streams,
        copy_streams=copy_streams,
        _undo=undo,
    )


def _divided(driver: Any, whole: Any, count: int, sizes: range) -> tuple[list[Any], Any]:
    """(`count` disjoint groups as large as possible, what is left), all of one split. Raises GreenContextError.

    The driver keeps multiprocessors together that could run one cluster of thread blocks, which may leave it with fewer
    groups than there is room for; kernels without clusters can do without that.
    """
    reason = GreenContextError(f"no size of {count} groups was tried")
    for size in sizes:
        for flags in (0, IGNORE_COSCHEDULING):
            try:
                parts, made, rest = _checked(driver, "cuDevSmResourceSplitByCount", count, whole, flags, size)
            except GreenContextError as error:
                reason = error
                continue
            if int(made) >= count:
                return list(parts[:count]), rest
            reason = GreenContextError(f"the driver makes {made} groups of {size} multiprocessors, not {count}")
    raise reason


def _try(device: torch.device, streams: tuple[torch.cuda.Stream, ...]) -> None:
    """Use each as the queues do: kernels, also of Triton, which its launcher has loaded into the primary context, and
    events of other streams. Raises GreenContextError where that does not work with streams that the driver made."""
    begin, end = new_event(), new_event()
    main = torch.cuda.current_stream(device)
    begin.record(main)
    try:
        for stream in streams:
            stream.wait_event(begin)
            with torch.cuda.stream(stream):
                some_M = torch.zeros(1, dtype=torch.int64, device=device).add_(1)
                if kernels.HAVE_TRITON:
                    routing_kernels.group(some_M, 2)
            end.record(stream)
            main.wait_event(end)
        torch.cuda.synchronize(device)
        begin.elapsed_time(end)
    except RuntimeError as error:
        raise GreenContextError(f"torch cannot use its streams: {' '.join(str(error).split())[:200]}") from None


def _copy_streams(
    driver: Any, device: torch.device, cu_device: Any, rest: Any, count: int, undo: list[Callable[[], None]]
) -> tuple[tuple[torch.cuda.Stream, ...], int]:
    """(one stream a partition, SMs that they have to themselves): plain streams where nothing is left over or the
    driver makes no context of so few."""
    if rest is not None:
        try:
            streams = _streams(driver, device, cu_device, rest, count, undo)
            _try(device, streams)
            return streams, int(rest.sm.smCount)
        except GreenContextError:
            pass
    return _plain(device, count), 0


def _plain(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(new_stream(device) for _ in range(count))


def _streams(
    driver: Any, device: torch.device, cu_device: Any, resource: Any, count: int, undo: list[Callable[[], None]]
) -> tuple[torch.cuda.Stream, ...]:
    """`count` streams of a new green context that has the SMs of `resource`; `undo` takes what destroys them."""
    descriptor = _checked(driver, "cuDevResourceGenerateDesc", [resource], 1)
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = _checked(driver, "cuGreenCtxCreate", descriptor, cu_device, flags)
    undo.append(partial(_checked, driver, "cuGreenCtxDestroy", context))
    streams = []
    for _ in range(count):
        raw = _checked(driver, "cuGreenCtxStreamCreate", context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0)
        undo.append(partial(_checked, driver, "cuStreamDestroy", raw))
        streams.append(stream_of(int(raw), device))
    return tuple(streams)


def _driver() -> Any:
    """`cuda.bindings.driver`. Raises GreenContextError where it is not installed or too old."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise GreenContextError(f"the package cuda-bindings cannot be imported ({error})") from None
    if not hasattr(driver, "cuGreenCtxStreamCreate"):
        raise GreenContextError("this cuda-bindings knows no green contexts: 12.5 or newer does")
    return driver


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _checked(driver: Any, name: str, *arguments: Any) -> Any:
    """What a driver function returns beside its status: nothing, one value or a tuple. Raises GreenContextError naming
    the function and the driver's own word for what went wrong."""
    try:
        status, *values = getattr(driver, name)(*arguments)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # the bindings' own complaints
        raise GreenContextError(f"{name}: {' '.join(str(error).split())}") from None
    if status != driver.CUresult.CUDA_SUCCESS:
        raise GreenContextError(f"{name}: {getattr(status, 'name', status)}")
    if len(values) > 1:
        return tuple(values)
    return values[0] if values else None
