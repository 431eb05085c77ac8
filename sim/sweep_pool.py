"""Who runs the runs of a sweep: this process, worker processes, or a Ray cluster. All give the same rows.

Runs are handed out in chunks of neighbours, which share their scenario. On this machine whoever has run one keeps its
row at once, so that a kill loses only what was running; from a cluster the rows come back one by one.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from moesim.sim.sweep import Progress, Row, Runner, Settings
from moesim.sim.sweep_store import Store, extra
from moesim.traces import InputError

CHUNK = 8
"""Runs that are handed out together at most."""


class Pool(Protocol):
    """Runs settings and keeps their rows."""

    def run(self, settings: Sequence[Settings], done: Progress) -> None:
        """Run all; `done` is told how many have just ended."""


def chunks(settings: Sequence[Settings], workers: int) -> list[list[Settings]]:
    """Neighbours that share their scenario, few enough that every worker gets some."""
    most = max(1, min(CHUNK, -(-len(settings) // (2 * workers))))
    found: list[list[Settings]] = []
    for one in settings:
        if not found or len(found[-1]) == most or found[-1][-1].scenario_key() != one.scenario_key():
            found.append([])
        found[-1].append(one)
    return found


@contextmanager
def open_pool(store: Store, workers: int, ray: str | None) -> Iterator[Pool]:
    """The pool that was asked for, until the sweep ends; on Ctrl-C nobody waits for what is running."""
    if ray is not None:
        cluster = _Cluster(store, ray)
        try:
            yield cluster
        finally:
            cluster.close()
        return
    if workers == 1:
        yield _Here(store)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads that others have started
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _begin, (store.folder,))
    try:
        yield _Workers(pool, workers)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()


class _Here:
    def __init__(self, store: Store) -> None:
        self._store, self._runner = store, Runner()

    def run(self, settings: Sequence[Settings], done: Progress) -> None:
        for row in self._runner.rows(settings):
            self._store.save(row)
            done(1)


class _Workers:
    def __init__(self, pool: ProcessPoolExecutor, workers: int) -> None:
        self._pool, self._workers = pool, workers

    def run(self, settings: Sequence[Settings], done: Progress) -> None:
        waiting = [self._pool.submit(_work, chunk) for chunk in chunks(settings, self._workers)]
        try:
            for future in as_completed(waiting):
                done(future.result())
        except BrokenProcessPool:
            raise InputError(
                "a worker process died (killed, or out of memory); what had finished is kept: run the same command "
                "again, perhaps with fewer --workers"
            ) from None


_mine: tuple[Store, Runner]


def _begin(folder: Path) -> None:
    global _mine  # noqa: PLW0603 # a worker process keeps its traces and predictors from chunk to chunk
    _mine = Store(folder), Runner()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A parent that was killed ends nobody; its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers have a parent"
    parent.join()
    os._exit(1)


def _work(chunk: list[Settings]) -> int:
    store, runner = _mine
    for row in runner.rows(chunk):
        store.save(row)
    return len(chunk)


class _Cluster:
    """Traces must be readable under the same path on every node, and moesim installed there."""

    def __init__(self, store: Store, address: str) -> None:
        self._store, self._ray = store, extra("ray", "ray", "--ray")
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # whatever ray raises where there is no cluster
            raise InputError(f"--ray {address}: {type(error).__name__}: {error}") from None

    def run(self, settings: Sequence[Settings], done: Progress) -> None:
        cores = int(self._ray.cluster_resources().get("CPU", 1))
        remote = self._ray.remote(num_returns="streaming")(_remote_rows)
        streams = [remote.remote(chunk) for chunk in chunks(settings, cores)]
        try:
            for row in self._arrived(streams):
                self._store.save(row)
                done(1)
        finally:
            for stream in streams:
                self._ray.cancel(stream, force=True)

    def close(self) -> None:
        """Leave the cluster; one that was started for this ends."""
        self._ray.shutdown()

    def _arrived(self, streams: list[Any]) -> Iterator[Row]:
        """Rows of all streams, whichever is there first."""
        waiting = list(streams)
        while waiting:
            (ready,), _ = self._ray.wait(waiting, num_returns=1, fetch_local=False)
            try:
                yield self._ray.get(next(ready))
            except StopIteration:
                waiting.remove(ready)


_runner: list[Runner] = []


def _remote_rows(chunk: list[Settings]) -> Iterator[Row]:
    if not _runner:
        _runner.append(Runner())  # a worker of the cluster keeps its traces from chunk to chunk
    yield from _runner[0].rows(chunk)
