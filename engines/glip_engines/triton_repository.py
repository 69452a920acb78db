"""A model repository for Triton Inference Server: a model `glip` that takes JPEG bytes and a prompt.

    DIR/glip/
      config.pbtxt   inputs, outputs, batching, instances, and the parameters of the detector
      1/model.py     for Triton's Python backend; what it does is in `glip_deploy.triton_model`
      1/bundle/      a copy of the bundle, with its engines where they are used

Neither Triton nor a GPU is needed to write it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path

from glip_deploy.backends import BACKENDS
from glip_deploy.bundle.engines import ENGINES, find_engines, read_records
from glip_deploy.bundle.manifest import MANIFEST, Bundle
from glip_deploy.errors import OptionError, OutputError
from glip_deploy.files import deliver_folder, not_written, temporary_sibling
from glip_deploy.triton_model import BUNDLE, INPUTS, OUTPUTS, PARAMETERS, TensorSpec
from glip_engines.options import BuildOptions

__all__ = ["MODEL", "write_repository"]

MODEL = "glip"
CONFIG = "config.pbtxt"
VERSION = "1"
TENSORRT = "tensorrt"
IMAGE = "image.plan"
_USUAL_BATCH = 8
_MOST = 1024
_IGNORES = frozenset(("batch", "overwrite", "verify"))
"""Options of a build that have a meaning here, or can be ignored."""
_CPU_BACKENDS = ("onnxruntime", "openvino")

_MODEL_PY = '''"""The model `glip`, for Triton's Python backend. Written by glip-build --triton."""

from pathlib import Path

from glip_deploy.triton_model import GlipModel


class TritonPythonModel(GlipModel):
    """Runs the bundle beside this file."""

    folder = Path(__file__).resolve().parent
'''


def write_repository(
    bundle_path: Path,
    folder: Path,
    options: BuildOptions,
    *,
    backend: str | None = None,
    batch: int | None = None,
    instances: int = 1,
) -> Path:
    """Write the model `glip` into a model repository.

    Args:
        bundle_path: an exported bundle.
        folder: the model repository, made if it does not exist; other models in it stay. The folder `glip` in it
            appears whole or not at all. One that exists is replaced with `options.overwrite`, if it was written by this
            function.
        options: only `overwrite` counts; one that is about building engines is refused.
        backend: what runs the bundle, one of `glip_deploy.backends.BACKENDS`; None for "tensorrt" where the bundle
            holds engines, else "onnxruntime".
        batch: the most pictures in a run; None for what the engines take, or 8, or 1 where the processor runs the
            bundle.
        instances: copies of the model, each a process; on GPUs, on each of them.

    Returns:
        `folder`.

    Raises:
        OptionError: an option that has no effect here or is out of range.
        BundleError: not a bundle.
        EngineError: damaged engines.
        OutputError: the model exists, or cannot be written. Nothing is left behind, whatever is raised.
    """
    for field in fields(BuildOptions):
        if field.name not in _IGNORES and getattr(options, field.name) != field.default:
            option = "--flavor" if field.name == "flavour" else f"--{field.name.replace('_', '-')}"
            raise OptionError(f"{option} is about building engines and has no effect with --triton; leave it out")
    if not 1 <= instances <= _MOST:
        raise OptionError(f"--instances is {instances}; legal is 1 to {_MOST}")
    if backend is not None and backend not in BACKENDS:
        raise OptionError(f'--backend is "{backend}"; legal is {", ".join(BACKENDS)}')
    bundle = Bundle.open(bundle_path)
    chosen = backend or (TENSORRT if read_records(bundle.path) else BACKENDS[0])
    most = _batch(bundle, chosen, batch)
    target = folder.resolve() / MODEL
    _check_target(target, options.overwrite)
    try:
        with temporary_sibling(target) as scratch:
            (scratch / CONFIG).write_text(_config(chosen, most, instances), encoding="utf-8")
            version = scratch / VERSION
            version.mkdir()
            (version / "model.py").write_text(_MODEL_PY, encoding="utf-8")
            bundle.load(partial(_copy, bundle, version / BUNDLE))
            if chosen == TENSORRT:
                _copy_engines(bundle, version / BUNDLE / ENGINES)
            _check_target(target, options.overwrite)
            deliver_folder(scratch, target, overwrite=options.overwrite)
    except OSError as error:
        raise not_written(target, error) from None
    return folder


def _batch(bundle: Bundle, backend: str, batch: int | None) -> int:
    """Return the most pictures in a run."""
    if batch is not None and not 1 <= batch <= _MOST:
        raise OptionError(f"--batch is {batch}; legal is 1 to {_MOST}")
    if backend != TENSORRT:
        return batch or (1 if backend in _CPU_BACKENDS else _USUAL_BATCH)
    records = read_records(bundle.path)
    if not records:
        raise OptionError(
            f"--backend tensorrt needs engines, and bundle {bundle.path} holds none;"
            f" build them with glip-build {bundle.path}, or use another backend"
        )
    # Any of the folders may be the one that fits the machine.
    most = min(profile["frames"][2][0] for _, record in records for profile in record.engines[IMAGE].profiles)
    if batch is not None and batch > most:
        raise OptionError(
            f"--batch is {batch}, but the engines take {most} at a time; build them with glip-build {bundle.path}"
            f" --batch {batch}, or leave it out"
        )
    return batch or most


def _copy(bundle: Bundle, target: Path, source: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)  # of an attempt before
    for name in (MANIFEST, *bundle.files):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _copy_engines(bundle: Bundle, target: Path) -> None:
    for folder in find_engines(bundle.path):
        shutil.copytree(folder, target / folder.name)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir() or not {path.name for path in target.iterdir()} <= {CONFIG, VERSION}:
        raise OutputError(f"--triton: {target} holds something else and is not replaced; name another folder")
    if any(target.iterdir()) and not overwrite:
        raise OutputError(f"--triton: {target} exists; add --overwrite, or name another folder")


# -- config.pbtxt ---------------------------------------------------------------------------------------------------


def _config(backend: str, batch: int, instances: int) -> str:
    kind = "KIND_CPU" if backend in _CPU_BACKENDS else "KIND_GPU"
    parameters = {**PARAMETERS, "backend": backend}
    return "\n".join(
        [
            "# Written by glip-build --triton.",
            f'name: "{MODEL}"',
            'backend: "python"',
            f"max_batch_size: {batch}",
            "",
            f"input [{_tensors(INPUTS)}]",
            f"output [{_tensors(OUTPUTS)}]",
            "",
            "# Requests that wait while the model is busy are run together. A delay lets more of them come together.",
            "dynamic_batching { max_queue_delay_microseconds: 0 }",
            "",
            "# Each instance is a process with the whole model.",
            f"instance_group [ {{ count: {instances} kind: {kind} }} ]",
            "",
            '# What the detector is opened with; "" is the default. THRESHOLD of a request goes before threshold here.',
            *(
                f"parameters {{ key: {json.dumps(name)} value {{ string_value: {json.dumps(text)} }} }}"
                for name, text in parameters.items()
            ),
            "",
        ]
    )


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    lines = [
        f'  {{ name: "{one.name}" data_type: {one.dtype} dims: [ {", ".join(map(str, one.dims))} ]'
        f"{' optional: true' if one.optional else ''} }}"
        for one in specs
    ]
    return "\n" + ",\n".join(lines) + "\n"
