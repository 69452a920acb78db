"""Makes the helper modules importable from every test, whatever the import mode; shares one tiny bundle."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from clean_environment import CleanEnvironment

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "parity")]

# A shell starts its background jobs with Ctrl-C ignored, and nohup ignores SIGHUP; the commands the tests interrupt
# would inherit that. A handler, unlike an ignored signal, is not inherited: they start with the default action.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# Tests import ONNX Runtime before the toolkit does, which would report to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


# Several test processes share the processors; torch's threads, as many in each as there are processors, would wait for
# one another. What says how many threads it wants is not changed by this.
# So do those of ONNX Runtime, which spin while they wait.
def share_processors(workers: int) -> None:
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with contextlib.suppress(ImportError):
        import onnxruntime

        original = onnxruntime.SessionOptions

        def options() -> Any:
            session = original()
            session.intra_op_num_threads = threads
            return session

        onnxruntime.SessionOptions = options


if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    share_processors(workers)

LONGEST = (
    "glip_deploy/batch/test_ray.py",
    "docs/test_commands.py",
    "test_packaging.py",
    "glip_export/test_end_to_end.py",
    "glip_engines/test_compile.py",
    "docs/test_docs.py",
    "glip_deploy/batch/test_batch.py",
    "glip_deploy/backends/test_openvino.py",
    "glip_deploy/serve/test_replicas.py",
    "glip_export/test_precision.py",
    "runtime/test_runtime.py",
    "runtime/test_tensorrt.py",
    "glip_deploy/serve/test_page.py",
    "faults/test_faults.py",
    "glip_bench/cli/test_run.py",
    "runtime/test_goldens.py",
    "glip_deploy/backends/test_tensorrt.py",
    "glip_engines/test_rewriting.py",
    "examples/test_examples.py",
    "glip_engines/test_inspection.py",
    "glip_export/test_goldens.py",
    "glip_bench/measuring/test_sweep.py",
    "glip_engines/test_builder.py",
    "glip_export/test_cli_export.py",
    "glip_engines/test_onnx_only.py",
    "glip_engines/test_deform_emulated.py",
)
"""Files that take longest, by time on the wall, roughly the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: a process that starts one last would leave the others with nothing to do."""
    ranks = {ROOT / "tests" / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that one of the test processes makes and fills, and the others wait for and read."""
    from filelock import FileLock

    shared = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder, partial = shared / name, shared / f"{name}-partial"
    with FileLock(shared / f"{name}.lock"):
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official-format `.pth` of a tiny GLIP; do not change it."""
    from tiny_glip import write_tiny

    return made_once(tmp_path_factory, "tiny", lambda folder: write_tiny(folder / "tiny.pth")) / "tiny.pth"


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle; do not change it (copy it: it is small)."""

    def make(folder: Path) -> None:
        from glip_export.bundle_writer import export_bundle

        export_bundle(tiny_checkpoint, folder / "bundle")

    return made_once(tmp_path_factory, "tiny-bundle", make) / "bundle"


@pytest.fixture(scope="session")
def tiny_graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder with all graphs of a tiny model, raw outputs included, by its options; do not change it.

    The graphs are as they were traced: nothing was compared, and the weights are not stored once.
    """

    def made(**options: Any) -> Path:
        def make(folder: Path) -> None:
            import torch
            from glip_export.onnx_export import export_image, export_text, split_image
            from tiny_glip import tiny_model

            model = tiny_model(**options)
            with torch.inference_mode():
                export_text(model, folder)
                split_image(model, export_image(model, folder), folder)

        return made_once(tmp_path_factory, "-".join(["tiny-graphs", *map(str, sum(options.items(), ()))]), make)

    return made


@pytest.fixture(scope="session")
def compiled_plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which plugins are kept once they were compiled, for tests that only use them."""
    return made_once(tmp_path_factory, "compiled-plugins", lambda folder: None)


@pytest.fixture(scope="session")
def half_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which glip-export made `bundle` in fp16, and said what is in `stderr`; do not change it."""

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "glip_export.cli", "--model", str(tiny_checkpoint)]
        command += ["--output", str(folder / "bundle"), "--precision", "fp16"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (folder / "stderr").write_text(done.stderr, encoding="utf-8")

    return made_once(tmp_path_factory, "tiny-half", make)


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of GLIP-nano, as `make demo` exports it; do not change it."""

    def make(folder: Path) -> None:
        from glip_export.bundle_writer import export_bundle

        export_bundle(ROOT / "examples" / "nano" / "glip_nano.pth", folder / "glip_nano")

    return made_once(tmp_path_factory, "nano", make) / "glip_nano"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    from clean_environment import build_wheel

    (made,) = made_once(tmp_path_factory, "wheel", build_wheel).glob("*.whl")
    return made


@pytest.fixture(scope="session")
def clean_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanEnvironment]:
    """A virtual environment of its own, empty at first, which tests fill extra by extra; about 2 GB in the end."""
    from clean_environment import CleanEnvironment

    folder = tmp_path_factory.mktemp("clean") / "env"
    yield CleanEnvironment(folder, wheel)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def complete_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanEnvironment]:
    """An environment of its own with every extra that a machine without a GPU can use.

    Only the wheel is installed; all that it requires is lent by the running environment. That every extra can be
    installed from the registry is what tests/test_packaging.py shows. Not the clean environment: a test of
    a package's absence there must not depend on which test came first.
    """
    from clean_environment import CleanEnvironment

    folder = tmp_path_factory.mktemp("complete") / "env"
    environment = CleanEnvironment(folder, wheel)
    extras = ["video", "track", "bench", "supervision", "openvino", "ray", "export"]
    extras += ["tensorrt-rtx", "plugin"] if sys.platform == "linux" else []
    environment.lend_extras(*extras)
    environment.pip("install", "--quiet", "--no-deps", wheel)
    yield environment
    shutil.rmtree(folder)
