"""Build the deformable convolution of `engines/plugin`, once per machine.

What is built is kept in the toolkit's cache folder (`glip_deploy.files.cache_folder`, below "plugin") under a name that
holds a hash of the sources, the compiler and its options: a changed source is another file, and two processes that
build the same one end with the same. A library is native code that will be loaded, so the folder must belong to the
user, and a file is used again only if it still has the hash that was recorded when it was built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.errors import EngineError, MissingPackage, OutputError
from glip_deploy.files import CACHE_VARIABLE, atomic_file, cache_folder, check_private, sha256_of, write_atomically
from glip_engines.compilers import (
    Nvrtc,
    find_host_compiler,
    find_nvcc,
    find_nvrtc,
    find_tensorrt_headers,
    run,
)

if TYPE_CHECKING:
    from glip_engines.flavours import Dialect

__all__ = [
    "ARCHITECTURES",
    "PORTABLE",
    "build_cubin",
    "build_host_library",
    "build_library",
    "code_for",
    "plugin_sources",
]

ARCHITECTURES = (60, 61, 70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
"""Compute capabilities the kernels are compiled to machine code for, 80 for 8.0."""
PORTABLE = 80
"""Compute capability of the PTX, which the driver compiles for GPUs of this capability and up that have no code."""
_FLAGS = ("-O3", "-std=c++17")


def plugin_sources() -> Path:
    """Return the folder of the C++ and CUDA sources: in the installed package, or in `engines/plugin` of a checkout.

    Raises:
        EngineError: this installation has none.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "plugin", package.parent / "plugin"):
        if (folder / "glip_deform.h").is_file():
            return folder
    raise EngineError(f"{package / 'plugin'} with the plugin's sources is missing; install glip-deploy again")


def build_host_library(source: str = "host/deform_host.cpp", defines: Sequence[str] = ()) -> Path:
    """Build one of the plain C++ sources as a shared library.

    Args:
        source: below the plugin's folder.
        defines: preprocessor definitions, NAME=VALUE.

    Raises:
        MissingPackage: no compiler.
        EngineError: it refuses the source.
        OutputError: the library cannot be kept.
    """
    compiler = find_host_compiler()
    # The kernels' source reads elements sixteen bytes at a time, which C++ does not allow a CPU.
    flags = ["-O2", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing"]
    flags += [f"-D{define}" for define in defines]
    file = plugin_sources() / source
    version = run([compiler, "--version"]).splitlines()[0]

    def build(target: Path) -> None:
        run([compiler, *flags, "-o", str(target), str(file)])

    return _cached(f"lib{Path(source).stem}", ".so", [version, source, *flags], build)


def build_cubin(arch: int) -> Path:
    """Compile the kernels alone for one compute capability: nvcc where it can, NVRTC otherwise.

    Args:
        arch: 80 for 8.0.

    Raises:
        MissingPackage: no compiler for it.
        EngineError: it refuses the source.
        OutputError: the machine code cannot be kept.
    """
    try:
        nvcc = find_nvcc()
    except MissingPackage:
        return _cubin_by_nvrtc(arch, find_nvrtc(arch))
    if arch < nvcc.oldest:
        return _cubin_by_nvrtc(arch, find_nvrtc(arch))
    flags = [*_FLAGS, "-cubin", f"-arch=sm_{arch}"]

    def build(target: Path) -> None:
        run([str(nvcc.path), *flags, "-o", str(target), str(plugin_sources() / "deform_kernel.cu")])

    return _cached(f"glip_deform_sm{arch}", ".cubin", ["nvcc", nvcc.version, *flags], build)


def _cubin_by_nvrtc(arch: int, nvrtc: Nvrtc) -> Path:
    options = ["--std=c++17", f"--gpu-architecture=sm_{arch}"]

    def build(target: Path) -> None:
        target.write_bytes(nvrtc.compile('#include "deform_kernel.cuh"\n', [*options, f"-I{plugin_sources()}"]))

    return _cached(f"glip_deform_sm{arch}", ".cubin", ["nvrtc", nvrtc.version, *options], build)


def code_for(arch: int) -> str:
    """Return what nvcc's -gencode is given for a compute capability (80 for 8.0): machine code, or PTX.

    Raises:
        EngineError: the kernels are not written for it.
    """
    if arch in ARCHITECTURES:
        return f"arch=compute_{arch},code=sm_{arch}"
    if arch > PORTABLE:
        return f"arch=compute_{PORTABLE},code=compute_{PORTABLE}"
    known = ", ".join(f"SM{known}" for known in ARCHITECTURES)
    raise EngineError(f"the plugin has no kernels for SM{arch}; it has them for {known}; use --form native")


def build_library(arches: Sequence[int], tensorrt: Dialect | None = None) -> Path:
    """Build the shared library of `glip_deform.h`, or the TensorRT plugin that contains it.

    Args:
        arches: compute capabilities, 80 for 8.0. One that is not among `ARCHITECTURES` gets the PTX of `PORTABLE`:
            machine code of a neighbor would run on some of them, but not on a Jetson's.
        tensorrt: with the adapter for this TensorRT: IPluginV2 for 8.6, IPluginV3 for later ones.

    Raises:
        MissingPackage: no nvcc, or no TensorRT headers.
        EngineError: the kernels are not written for an architecture, nvcc is too new for it, or refuses the sources.
        OutputError: the library cannot be kept.
    """
    nvcc = find_nvcc()
    code = []
    for arch in arches:
        code.append(code_for(arch))
        if arch < nvcc.oldest:
            raise EngineError(
                f"nvcc {nvcc.version} compiles for compute capability {nvcc.oldest / 10} and up, not {arch / 10};"
                " point $CUDA_HOME at CUDA 12"
            )
    sources = plugin_sources()
    files = [str(sources / "deform_kernel.cu")]
    flags = [*_FLAGS, "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
    flags += [f"-gencode={words}" for words in dict.fromkeys(code)]
    if tensorrt is not None:
        files.append(str(sources / ("adapter_v2.cpp" if tensorrt.is_8 else "adapter_v3.cpp")))
        flags += ["-isystem", str(find_tensorrt_headers(of_8=tensorrt.is_8)), "-ldl"]

    def build(target: Path) -> None:
        run([str(nvcc.path), *flags, "-o", str(target), *files])

    name = "libglip_deform" if tensorrt is None else "libglip_deform_tensorrt"
    return _cached(name, ".so", ["nvcc", nvcc.version, *files, *flags], build)


# -- the cache ------------------------------------------------------------------------------------------------------


def _source_hash() -> str:
    digest = hashlib.sha256()
    folder = plugin_sources()
    for file in sorted(folder.rglob("*")):
        if file.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _cached(name: str, suffix: str, facts: Sequence[str], build: Callable[[Path], None]) -> Path:
    """Return the file of these facts, built unless it is there and unchanged; it appears whole or not at all.

    Raises:
        OutputError: there is no folder to keep it in, it belongs to someone else, or it cannot be written.
    """
    key = hashlib.sha256("\n".join([_source_hash(), *facts]).encode()).hexdigest()[:16]
    folder = cache_folder("plugin")
    if folder is None:
        raise OutputError(f"there is no home folder to keep the plugin in; set {CACHE_VARIABLE} to a folder of yours")
    path = folder / f"{name}-{key}{suffix}"
    record = path.with_name(f"{path.name}.sha256")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(folder)
        if path.is_file() and record.is_file() and record.read_text(encoding="ascii") == sha256_of(path):
            return path
        with atomic_file(path) as partial:
            build(partial)
            digest = sha256_of(partial)
        write_atomically(record, digest)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path} cannot be written ({reason}); set {CACHE_VARIABLE} to another folder") from None
    return path
