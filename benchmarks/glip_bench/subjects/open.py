"""Which subjects can run on this machine, and why the others cannot; loading them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_bench.subjects.base import Options, SubjectName
from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    from glip_bench.subjects.base import Subject

__all__ = ["absence", "choose", "open_subjects"]


def absence(name: SubjectName, options: Options) -> str | None:
    """Say in a line why a subject cannot run here; None where it can.

    Only looks: nothing is loaded but ONNX Runtime's list of providers.
    """
    if name.needs_checkpoint:
        return _torch_absence(options.checkpoint)
    if name.is_yardstick:
        from glip_bench.subjects.yardstick import yardstick_absence

        return yardstick_absence()
    if name in (SubjectName.TENSORRT, SubjectName.TENSORRT_RTX):
        from glip_bench.subjects.engine import engine_absence

        return engine_absence(name, options.bundle)
    from glip_bench.subjects.bundle import provider_absence

    return provider_absence(name)


def _torch_absence(checkpoint: Path | None) -> str | None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        return "torch is not installed; pip install 'glip-deploy[export]'"
    if find_spec("glip_export") is None:
        return "glip_export is not installed; pip install 'glip-deploy[export]'"
    if checkpoint is None:
        return "it runs the released weights; name them with --checkpoint glip_t.pth"
    return None


def choose(names: Sequence[str] | None, options: Options) -> tuple[list[SubjectName], dict[str, str]]:
    """Decide what runs.

    Args:
        names: asked for, in order; None for every one that can run.
        options: see `Options`.

    Returns:
        (those that run, reason by name of those that cannot).

    Raises:
        GlipError: an unknown name, or one asked for that cannot run, or none that can.
    """
    legal = ", ".join(SubjectName)
    if names is not None:
        wanted = []
        for name in dict.fromkeys(names):
            if name not in SubjectName.__members__.values():
                raise GlipError(f'subject "{name}" is unknown; legal are {legal}')
            wanted.append(SubjectName(name))
        if not wanted:
            raise GlipError(f"no subjects are named; legal are {legal}")
        for one in wanted:
            reason = absence(one, options)
            if reason is not None:
                raise GlipError(f"subject {one} cannot run: {reason}")
        return wanted, {}
    reasons = {name: absence(name, options) for name in SubjectName if options.yardsticks or not name.is_yardstick}
    present = [name for name, reason in reasons.items() if reason is None]
    if not present:
        raise GlipError(f"no subject can run here; onnxruntime-cpu: {reasons[SubjectName.ONNXRUNTIME_CPU]}")
    return present, {str(name): reason for name, reason in reasons.items() if reason is not None}


def open_subjects(
    names: Sequence[SubjectName], options: Options, on_step: Callable[[str], None] = lambda step: None
) -> Iterator[tuple[Subject, float]]:
    """Load subjects one after another; gives each with the seconds that took.

    The two torch subjects share one copy of the weights, which the first of them is charged for.

    Raises:
        GlipError: a damaged bundle or checkpoint, a checkpoint that is not the bundle's, an engine that fails.
    """
    from glip_deploy.bundle.manifest import Bundle

    bundle = Bundle.open(options.bundle)
    weights: Any = None
    for name in names:
        on_step(f"open {name}")
        start = time.perf_counter()
        subject: Subject
        if name.needs_checkpoint:
            from glip_bench.subjects.checkpoint import TorchSubject, load_weights

            weights = weights or load_weights(options, bundle)
            subject = TorchSubject(name, options, bundle, weights)
        elif name.is_yardstick:
            from glip_bench.subjects.yardstick import YardstickSubject

            subject = YardstickSubject(name, options, bundle)
        elif name in (SubjectName.TENSORRT, SubjectName.TENSORRT_RTX):
            from glip_bench.subjects.engine import open_engine_subject

            subject = open_engine_subject(name, options, bundle)
        else:
            from glip_bench.subjects.bundle import open_onnx_subject

            subject = open_onnx_subject(name, options, bundle)
        yield subject, time.perf_counter() - start
