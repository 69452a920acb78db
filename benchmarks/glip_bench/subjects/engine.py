"""TensorRT engines of a bundle, where glip_deploy can run them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glip_bench.subjects.base import Options, SubjectName
from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    from glip_bench.subjects.bundle import BundleSubject
    from glip_deploy.bundle.manifest import Bundle

__all__ = ["engine_absence", "open_engine_subject"]

BACKEND = "tensorrt"  # of glip_deploy; it serves both flavours
PACKAGES = {SubjectName.TENSORRT: "tensorrt", SubjectName.TENSORRT_RTX: "tensorrt_rtx"}


def engine_absence(name: SubjectName, bundle: Path) -> str | None:
    """Say why a bundle's engines cannot run here; None where they can. Nothing is loaded."""
    from importlib.util import find_spec

    from glip_bench.machine.gpus import describe_gpus
    from glip_deploy.backends import BACKENDS
    from glip_deploy.bundle.engines import read_records

    found = find_spec(PACKAGES[name])
    if found is None or found.origin is None:  # no origin: an empty folder of that name, type stubs for instance
        return f"the package {PACKAGES[name]} is not installed; pip install 'glip-deploy[{name}]'"
    if not describe_gpus():
        return "there is no NVIDIA GPU here"
    if BACKEND not in BACKENDS:
        return f"this glip-deploy has no {BACKEND} backend; it has {', '.join(BACKENDS)}"
    try:
        flavours = {record.flavour for _, record in read_records(bundle)}
    except GlipError as error:
        return str(error)
    if name not in flavours:
        return f"the bundle has no engines for it; glip-build {bundle} --flavour {name}"
    return None


def open_engine_subject(name: SubjectName, options: Options, bundle: Bundle) -> BundleSubject:
    """Load a bundle's engines.

    Raises:
        GlipError: whatever the backend says of them.
    """
    from glip_bench.subjects.bundle import BundleSubject
    from glip_deploy.backends import open_backend
    from glip_deploy.bundle.engines import read_records

    folder, record = next((folder, record) for folder, record in read_records(bundle.path) if record.flavour == name)
    backend = open_backend(BACKEND, bundle, options.threads, folder)
    return BundleSubject(name, options, bundle, backend, "cuda", record.precision)
