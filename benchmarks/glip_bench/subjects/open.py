"""Which subjects can run on this machine, and why the others cannot; loading them."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from glip_bench.subjects.base import Options, Subject, SubjectName
from glip_deploy.errors import OptionError

if TYPE_CHECKING:
    from glip_deploy.bundle.manifest import Bundle

__all__ = ["absence", "choose", "open_subjects"]


def absence(name: SubjectName, options: Options) -> str | None:
    """Say in a line why a subject cannot run here; return None where it can. No model is loaded."""
    if name.needs_checkpoint or name.is_yardstick:
        extra, other = ("export", "glip_export") if name.needs_checkpoint else ("yardsticks", "transformers")
        for package in ("torch", other):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed; pip install 'glip-deploy[{extra}]'"
        if name.needs_checkpoint and options.checkpoint is None:
            return "it runs the released weights; name them with --checkpoint glip_t.pth"
        return None
    from glip_bench.subjects.bundle import bundle_absence

    return bundle_absence(name, options)


def choose(names: Sequence[str] | None, options: Options) -> tuple[list[SubjectName], dict[str, str]]:
    """Decide what runs.

    Args:
        names: asked for, in order; None for every subject that can run.
        options: see `Options`.

    Returns:
        (those that run, reason by name of those that cannot).

    Raises:
        OptionError: an unknown name, or one asked for that cannot run, or none that can.
    """
    if names is not None:
        legal = ", ".join(SubjectName)
        wanted = []
        for name in dict.fromkeys(names):
            if name not in SubjectName.__members__.values():
                raise OptionError(f'subject "{name}" is unknown; legal are {legal}')
            wanted.append(SubjectName(name))
        if not wanted:
            raise OptionError(f"no subjects are named; legal are {legal}")
        for one in wanted:
            reason = absence(one, options)
            if reason is not None:
                raise OptionError(f"subject {one} cannot run: {reason}")
        return wanted, {}
    reasons = {name: absence(name, options) for name in SubjectName if options.yardsticks or not name.is_yardstick}
    present = [name for name, reason in reasons.items() if reason is None]
    if not present:
        raise OptionError(f"no subject can run here; onnxruntime-cpu: {reasons[SubjectName.ONNXRUNTIME_CPU]}")
    return present, {str(name): reason for name, reason in reasons.items() if reason is not None}


def open_subjects(
    names: Sequence[SubjectName], options: Options, on_step: Callable[[str], None] = lambda step: None
) -> Iterator[tuple[Subject, float]]:
    """Load subjects one after another; give each with the seconds that took.

    The two torch subjects share one copy of the weights; reading it counts for the first of them.

    Raises:
        GlipError: a damaged bundle or checkpoint, a checkpoint that is not the bundle's, an engine that fails.
    """
    from glip_deploy.bundle.manifest import Bundle

    bundle = Bundle.open(options.bundle)
    if options.max_detections is not None:
        bundle = _with_max_detections(bundle, options.max_detections)
    weights: list[Any] = []
    for name in names:
        on_step(f"open {name}")
        start = time.perf_counter()
        subject = _open(name, options, bundle, weights)
        yield subject, time.perf_counter() - start


def _with_max_detections(bundle: Bundle, count: int) -> Bundle:
    from msgspec.structs import replace as replaced

    config = bundle.manifest.config
    config = replaced(config, head=replaced(config.head, max_detections=count))
    return replace(bundle, manifest=replaced(bundle.manifest, config=config))


def _open(name: SubjectName, options: Options, bundle: Bundle, weights: list[Any]) -> Subject:
    if name.needs_checkpoint:
        from glip_bench.subjects.checkpoint import CheckpointSubject, load_weights

        if not weights:
            weights.append(load_weights(options, bundle))
        return CheckpointSubject(name, options, bundle, weights[0])
    if name.is_yardstick:
        from glip_bench.subjects.yardstick import YardstickSubject

        return YardstickSubject(name, options, bundle)
    from glip_bench.subjects.bundle import open_bundle_subject

    return open_bundle_subject(name, options, bundle)
