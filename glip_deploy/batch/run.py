"""A run of a job: plan, workers, record, results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from glip_deploy.batch.plan import Failure, MediaFile, Plan, is_complete
from glip_deploy.batch.worker import Worker

if TYPE_CHECKING:
    from glip_deploy.batch.messages import Outcome, Setup, Unit
    from glip_deploy.batch.record import Recorder

__all__ = ["OwnProcess", "Pool", "run_units"]


class Pool(AbstractContextManager["Pool"], Protocol):
    """Whoever turns units into outcomes."""

    def outcomes(self, units: Sequence[Unit]) -> Iterator[Outcome | None]:
        """Give the outcome of each unit once, in any order; None where none came for a moment."""


class OwnProcess:
    """A single worker in this process, without Ray.

    Args:
        setup: the job.
        threads: CPU threads; None for one a core.
    """

    def __init__(self, setup: Setup, threads: int | None = None) -> None:
        self._worker = Worker(setup, threads)

    def __enter__(self) -> Self:
        self._worker.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.close()

    def outcomes(self, units: Sequence[Unit]) -> Iterator[Outcome | None]:
        """Give the outcome of each unit, in their order."""
        yield from self._worker(units)


def run_units(
    plan: Plan,
    files: Sequence[MediaFile],
    recorder: Recorder,
    pool: Pool,
    advance: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Failure]:
    """Do what is left, recording it; after an exception what was done until then is recorded too.

    Args:
        plan: what is left.
        files: of the source.
        recorder: takes the outcomes.
        pool: the workers; opened only if there is something to do.
        advance: called after each unit.

    Returns:
        What could not be done, in the order of the files.

    Raises:
        OutputError: an outcome cannot be recorded.
        GlipError: the workers cannot work; or Ray failed.
    """
    failures = list(plan.failures)
    if plan.units:
        with pool:
            try:
                for outcome in pool.outcomes(plan.units):
                    if outcome is None:
                        recorder.tick()
                    elif outcome.failure:
                        part_of_video = outcome.first or outcome.end is not None
                        frames = (outcome.first, outcome.end) if part_of_video else (None, None)
                        failures.append(Failure(outcome.name, outcome.failure, *frames))
                        advance(outcome)
                    else:
                        recorder.add(outcome)
                        advance(outcome)
            finally:
                recorder.flush()
    named = {failure.name for failure in failures}
    for file in files:
        if file.name not in named and not is_complete(recorder.entries(file.name, file.size, file.modified)):
            failures.append(Failure(file.name, "the file was changed during the run; run the same command again"))
    places = {file.name: place for place, file in enumerate(files)}
    return _merged(sorted(failures, key=lambda one: (places[one.name], one.first or 0)))


def _merged(failures: Sequence[Failure]) -> list[Failure]:
    """Join parts of a video that follow each other and failed for the same reason."""
    merged: list[Failure] = []
    for one in failures:
        last = merged[-1] if merged else None
        if last and (last.name, last.reason, last.end) == (one.name, one.reason, one.first) and one.first is not None:
            merged[-1] = Failure(one.name, one.reason, last.first, one.end)
        else:
            merged.append(one)
    return merged
