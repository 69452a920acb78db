"""Workers on Ray: a pool of actors that Ray Data gives units to, on this machine or on a cluster.

A unit whose worker is killed is given to another. Units that take their worker with them every time are found by
giving each left one alone, and become failures, so that one file cannot end the run.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import msgspec

from glip_deploy.batch.cluster import Cluster, check_address
from glip_deploy.batch.messages import Outcome, Setup, Unit
from glip_deploy.batch.worker import Worker
from glip_deploy.errors import BackendError, GlipError, OptionError, reason_of

if TYPE_CHECKING:
    import pyarrow

__all__ = ["RayPool"]

_log = logging.getLogger(__name__)
_TASK_FRAMES = 16
"""Frames that a task has at least: fewer, and Ray's own work per task would show."""
_RETRIES = 3
"""How often a task is tried again whose worker was killed."""
_TICK = 0.2
_PATIENCE = 10.0
"""Seconds that the threads of Ray Data have to end."""


class RayPool:
    """A pool of workers; a context manager, as it may start Ray.

    Args:
        setup: the job.
        workers: how many.
        address: "local" starts a Ray on this machine for as long as the pool is open; "auto" and HOST:PORT are a
            cluster that is running.
        threads: CPU threads of each worker; None divides the cores among them.
        gpus: of each worker; may be a fraction.

    Raises:
        MissingPackage: Ray is not installed; when it is entered.
        OptionError: no cluster answers there, or it lacks the cores or GPUs; when it is entered.
    """

    def __init__(
        self, setup: Setup, *, workers: int, address: str = "local", threads: int | None = None, gpus: float = 0
    ) -> None:
        check_address(address)
        self._setup = setup
        self._workers = workers
        self._address = address
        self._threads = threads
        self._gpus = gpus
        self._noted: set[str] = set()
        self._consumer: threading.Thread | None = None

    def __enter__(self) -> Self:
        cores = None
        if self._address == "local":
            self._threads = self._threads or max(1, _cores() // self._workers)
            cores = self._threads * self._workers  # more than there are, if the user asked for that
        self._cluster = Cluster(self._address, cores)
        self._cluster.open()
        try:
            self._check_resources()
        except BaseException:
            self._cluster.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # A thread that asks Ray for something while it is shut down has the whole process ended by Ray, with status 1.
        if self._consumer is not None:
            _end_ray_data(self._consumer)
        self._cluster.close()

    def outcomes(self, units: Sequence[Unit]) -> Iterator[Outcome | None]:
        """Give the outcomes of units as they come, in any order, each once; None where none came for a moment.

        Raises:
            GlipError: workers cannot open the bundle, or Ray failed.
        """
        left = {(unit.name, unit.first): unit for unit in units}
        # First several units a task; what is left after that alone, to find the unit that ends its worker.
        for alone in (False, True):
            tasks = list(_tasks(list(left.values()), 1 if alone else _TASK_FRAMES))
            if not tasks:
                return
            if alone:
                _log.warning("%d units ended their workers; they are tried one by one", len(left))
            for outcome in self._run(tasks, alone=alone):
                if outcome is None:
                    yield None
                elif left.pop((outcome.name, outcome.first), None) is not None:
                    yield outcome
        for unit in left.values():
            reason = "the worker process ended each time it was tried (it crashed, or was killed for its memory)"
            yield Outcome(unit.name, unit.first, unit.end, failure=reason)

    def _run(self, tasks: Sequence[bytes], *, alone: bool) -> Iterator[Outcome | None]:
        # Reading Ray's results may block for long, and Ctrl-C has to get through.
        results: queue.SimpleQueue[pyarrow.Table | BaseException | None] = queue.SimpleQueue()

        def consume() -> None:
            try:
                dataset = self._dataset(tasks, alone=alone)
                for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                    results.put(table)
                results.put(None)
            except BaseException as error:
                results.put(error)

        self._consumer = threading.Thread(target=consume, name="glip-ray", daemon=True)
        self._consumer.start()
        while True:
            try:
                table = results.get(timeout=_TICK)
            except queue.Empty:
                yield None
                continue
            if table is None:
                return
            if isinstance(table, BaseException):
                raise BackendError(
                    f"Ray ended the run ({reason_of(table)}); run the same command again to go on"
                ) from table
            for data in table["outcome"].to_pylist():
                outcome = msgspec.msgpack.decode(data, type=Outcome)
                self._log_notes(outcome)
                if outcome.fatal is not None:
                    raise _error_of(*outcome.fatal)
                yield outcome

    def _dataset(self, tasks: Sequence[bytes], *, alone: bool) -> Any:
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        # Ray Data has no other way yet to say how often a task is tried again.
        warnings.filterwarnings("ignore", message=".*ray_remote_args. is deprecated")
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = 1  # an outcome is passed on at once, not when its task ends
        # By default a worker waits with its third outcome until the first is taken, which cost it a third of its time.
        # A task has 16 outcomes at most, and they are small.
        context._max_num_blocks_in_streaming_gen_buffer = None
        context.max_errored_blocks = -1  # a task whose worker is killed every time is no end of the others
        size = min(self._workers, len(tasks))
        return ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks)).map_batches(
            _RayWorker,
            fn_constructor_args=(self._setup, self._threads),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1 if alone else 2),
            num_cpus=self._threads,
            num_gpus=self._gpus or None,
            max_restarts=-1,
            max_task_retries=1 if alone else _RETRIES,
        )

    def _log_notes(self, outcome: Outcome) -> None:
        for note in outcome.notes:
            if note not in self._noted:
                self._noted.add(note)
                _log.warning("%s", note)

    def _check_resources(self) -> None:
        import ray

        resources = ray.cluster_resources()
        cores, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
        if self._threads is None:
            largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
            self._threads = max(1, int(min(cores / self._workers, largest)))
        needed = self._threads * self._workers
        if needed > cores:
            raise OptionError(
                f"--workers {self._workers} with {self._threads} threads each take {needed} cores, Ray has {cores:g};"
                " ask for fewer workers, or threads"
            )
        if self._gpus * self._workers > gpus:
            raise OptionError(
                f"--workers {self._workers} with {self._gpus:g} GPUs each take {self._gpus * self._workers:g} GPUs,"
                f" Ray has {gpus:g}; ask for fewer workers, or a fraction of a GPU for each"
            )


class _RayWorker:
    """A `Worker` behind the interface of Ray Data: tables of tasks in, tables with an outcome each out."""

    def __init__(self, setup: Setup, threads: int | None) -> None:
        self._worker = Worker(setup, threads)
        self._notes = _Notes()
        logger = logging.getLogger("glip_deploy")
        logger.addHandler(self._notes)
        logger.setLevel(logging.WARNING)

    def __call__(self, tasks: pyarrow.Table) -> Iterator[pyarrow.Table]:
        import pyarrow

        for task in tasks["task"].to_pylist():
            for outcome in self._outcomes(msgspec.msgpack.decode(task, type=list[Unit])):
                data = msgspec.msgpack.encode(msgspec.structs.replace(outcome, notes=self._notes.take()))
                yield pyarrow.table({"outcome": pyarrow.array([data], pyarrow.binary())})

    def _outcomes(self, units: list[Unit]) -> Iterator[Outcome]:
        try:
            yield from self._worker(units)
        except GlipError as error:
            yield Outcome(units[0].name, units[0].first, fatal=(type(error).__name__, str(error)))


class _Notes(logging.Handler):
    """Keeps the warnings of a worker, whose own streams nobody reads."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(record.getMessage().encode("utf-8", "backslashreplace").decode())

    def take(self) -> list[str]:
        kept, self._kept = self._kept, []
        return kept


def _end_ray_data(consumer: threading.Thread) -> None:
    """End what Ray Data is at, and the thread that waits for its results.

    It has no public way to do that from another thread; its executor is a thread, with a method that does.
    """
    until = time.monotonic() + _PATIENCE
    while consumer.is_alive() and time.monotonic() < until:
        executors = [thread for thread in threading.enumerate() if type(thread).__name__ == "StreamingExecutor"]
        for executor in executors:
            with suppress(Exception):  # one that is about to end by itself
                executor.shutdown(force=True)  # type: ignore[attr-defined]
        consumer.join(_TICK)  # it may not have come to start its executor yet
    if consumer.is_alive():
        _log.warning("Ray Data did not end within %g s; Ray may end this process with status 1", _PATIENCE)


def _tasks(units: Sequence[Unit], frames: int) -> Iterator[bytes]:
    """Put units together until they have so many frames."""
    task: list[Unit] = []
    for unit in units:
        task.append(unit)
        if sum(one.frames for one in task) >= frames:
            yield msgspec.msgpack.encode(task)
            task = []
    if task:
        yield msgspec.msgpack.encode(task)


def _error_of(kind: str, message: str) -> GlipError:
    from glip_deploy import errors

    error: GlipError = getattr(errors, kind, GlipError)(message)
    return error


def _cores() -> int:
    with suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
