"""Find compilers and build the deformable convolution of `engines/plugin`, once per machine.

What is built is kept in the toolkit's cache folder (`glip_deploy.files.cache_folder`, below "plugin") under a name that
holds a hash of the sources, the compiler and its options: a changed source is another file, and two processes that
build the same one end with the same. A library is native code that will be loaded, so the folder must belong to the
user, and a file is used again only if it still has the hash that was recorded when it was built.

nvcc 13 builds for compute capability 7.5 and up. For 6.0 and 7.0, and where there is no nvcc at all, NVRTC compiles the
kernels, which include no header but their own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from glip_deploy.errors import EngineError, GlipError, OutputError
from glip_deploy.files import CACHE_VARIABLE, atomic_file, cache_folder, sha256_of, write_atomically

__all__ = [
    "ARCHITECTURES",
    "Nvcc",
    "Nvrtc",
    "build_cubin",
    "build_host_library",
    "build_library",
    "find_host_compiler",
    "find_nvcc",
    "find_nvrtc",
    "find_tensorrt_headers",
    "plugin_sources",
]

ARCHITECTURES = (60, 70, 75, 80, 86, 89, 90, 120)
"""Compute capabilities the kernels are built for, 80 for 8.0."""
NVCC_OLDEST = 75
"""nvcc 13 knows no older."""
COMMON = ("-O3", "-std=c++17")
SYSTEM_CUDA = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Nvcc:
    """NVIDIA's offline compiler."""

    path: Path
    version: str
    """13.0, say."""

    @property
    def oldest(self) -> int:
        """The lowest compute capability it compiles for."""
        return NVCC_OLDEST if int(self.version.split(".", maxsplit=1)[0]) >= 13 else 50


@dataclass(frozen=True)
class Nvrtc:
    """NVIDIA's compiler as a library."""

    path: Path
    version: str
    oldest: int
    """The lowest compute capability it compiles for."""


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


# -- compilers ------------------------------------------------------------------------------------------------------


def _package_folders() -> Iterator[Path]:
    """Where pip puts NVIDIA's packages: site-packages/nvidia/<cu13, cuda_nvrtc, ...>."""
    for site in dict.fromkeys(sysconfig.get_paths()[name] for name in ("platlib", "purelib")):
        yield from sorted((Path(site) / "nvidia").glob("cu*"), reverse=True)


def find_host_compiler() -> str:
    """The C++ compiler: $CXX, or c++, g++ or clang++ on the PATH.

    Raises:
        GlipError: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path is not None:
            return path
    raise GlipError("there is no C++ compiler on the PATH; install one (apt-get install g++) or name it in $CXX")


def find_nvcc() -> Nvcc:
    """Look in $CUDA_HOME, on the PATH, among pip's packages, in /usr/local/cuda.

    Raises:
        GlipError: there is none, or it does not run.
    """
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    candidates = [home / "bin" / "nvcc" for home in homes]
    candidates += [Path(on_path)] if on_path else []
    candidates += [folder / "bin" / "nvcc" for folder in _package_folders()]
    candidates.append(SYSTEM_CUDA / "bin" / "nvcc")
    for path in candidates:
        if path.is_file() and os.access(path, os.X_OK):
            release = re.search(r"release (\d+\.\d+)", _run([str(path), "--version"]))
            if release is None:
                raise GlipError(f"{path} --version names no release; point $CUDA_HOME at another CUDA toolkit")
            return Nvcc(path, release[1])
    raise GlipError(
        "there is no nvcc in $CUDA_HOME, on the PATH or among pip's packages; pip install nvidia-cuda-nvcc (CUDA 13),"
        " or install the CUDA toolkit"
    )


def find_nvrtc(arch: int) -> Nvrtc:
    """An NVRTC that compiles for a compute capability, among pip's packages, $CUDA_HOME and the system's libraries.

    Args:
        arch: 80 for 8.0.

    Raises:
        GlipError: there is none.
    """
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [folder / "lib" for folder in _package_folders()]
    folders += [home / sub for home in (*homes, SYSTEM_CUDA) for sub in ("lib64", "lib")]
    names = [str(path) for folder in folders for path in sorted(folder.glob("libnvrtc.so.*"))]
    for name in (*names, "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        oldest = NVCC_OLDEST if major.value >= 13 else 50
        if arch >= oldest:
            return Nvrtc(Path(name), f"{major.value}.{minor.value}", oldest)
    package = "nvidia-cuda-nvrtc-cu12" if arch < NVCC_OLDEST else "nvidia-cuda-nvrtc"
    raise GlipError(f"there is no NVRTC that compiles for compute capability {arch / 10}; pip install {package}")


def find_tensorrt_headers() -> Path:
    """The folder that holds NvInfer.h: $TENSORRT_HOME/include, the package kernel-lens (10.14), the system's.

    Raises:
        GlipError: there is none.
    """
    home = os.environ.get("TENSORRT_HOME")
    folders = [Path(home) / "include"] if home else []
    for site in dict.fromkeys(sysconfig.get_paths()[name] for name in ("platlib", "purelib")):
        folders.append(Path(site) / "kernel_lens" / "include" / "tensorrt")
    folders += [Path("/usr/include/x86_64-linux-gnu"), Path("/usr/include/aarch64-linux-gnu"), Path("/usr/include")]
    for folder in folders:
        if (folder / "NvInfer.h").is_file():
            return folder
    raise GlipError(
        "NvInfer.h is not in $TENSORRT_HOME/include nor in the system; pip install kernel-lens (10.14),"
        " or point $TENSORRT_HOME at a TensorRT"
    )


# -- what is built --------------------------------------------------------------------------------------------------


def build_host_library(source: str = "host/deform_host.cpp", defines: Sequence[str] = ()) -> Path:
    """Build one of the plain C++ sources as a shared library.

    Args:
        source: below the plugin's folder.
        defines: preprocessor definitions, NAME=VALUE.

    Raises:
        GlipError: no compiler, or it refuses.
    """
    compiler = find_host_compiler()
    # The kernels' source reads elements sixteen bytes at a time, which C++ allows a GPU only.
    flags = ["-O2", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing"]
    flags += [f"-D{define}" for define in defines]
    file = plugin_sources() / source
    version = _run([compiler, "--version"]).splitlines()[0]

    def build(target: Path) -> None:
        _run([compiler, *flags, "-o", str(target), str(file)])

    return _cached(f"lib{Path(source).stem}", ".so", [version, source, *flags], build)


def build_cubin(arch: int) -> Path:
    """Compile the kernels alone for one compute capability: nvcc where it can, NVRTC otherwise.

    Args:
        arch: 80 for 8.0.

    Raises:
        GlipError: no compiler for it, or it refuses.
    """
    try:
        nvcc = find_nvcc()
    except GlipError:
        return _cubin_by_nvrtc(arch, find_nvrtc(arch))
    if arch < nvcc.oldest:
        return _cubin_by_nvrtc(arch, find_nvrtc(arch))
    flags = [*COMMON, "-cubin", f"-arch=sm_{arch}"]

    def build(target: Path) -> None:
        _run([str(nvcc.path), *flags, "-o", str(target), str(plugin_sources() / "deform_kernel.cu")])

    return _cached(f"glip_deform_sm{arch}", ".cubin", ["nvcc", nvcc.version, *flags], build)


def build_library(arches: Sequence[int], tensorrt: bool = False) -> Path:
    """Build the shared library of `glip_deform.h`, or the TensorRT plugin that contains it.

    Args:
        arches: compute capabilities, 80 for 8.0.
        tensorrt: with the adapter for the TensorRT whose headers are found: IPluginV3, or IPluginV2 for 8.6.

    Raises:
        GlipError: no nvcc or one that is too new for an architecture, no TensorRT headers, or it refuses.
    """
    nvcc = find_nvcc()
    for arch in arches:
        if arch < nvcc.oldest:
            raise GlipError(
                f"nvcc {nvcc.version} compiles for compute capability {nvcc.oldest / 10} and up, not {arch / 10};"
                " point $CUDA_HOME at CUDA 12"
            )
    sources = plugin_sources()
    files = [str(sources / "deform_kernel.cu")]
    flags = [*COMMON, "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches]
    if tensorrt:
        headers = find_tensorrt_headers()
        files.append(str(sources / ("adapter_v3.cpp" if _headers_major(headers) >= 10 else "adapter_v2.cpp")))
        flags += ["-isystem", str(headers), "-ldl"]

    def build(target: Path) -> None:
        _run([str(nvcc.path), *flags, "-o", str(target), *files])

    name = "libglip_deform_tensorrt" if tensorrt else "libglip_deform"
    return _cached(name, ".so", ["nvcc", nvcc.version, *flags], build)


def _headers_major(folder: Path) -> int:
    """TensorRT's major version, as NvInferVersion.h has it (under another name from 10.13 on)."""
    text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    for name in ("TRT_MAJOR_ENTERPRISE", "NV_TENSORRT_MAJOR"):
        found = re.search(rf"^#define {name} (\d+)", text, re.MULTILINE)
        if found is not None:
            return int(found[1])
    raise GlipError(f"{folder}/NvInferVersion.h names no version; point $TENSORRT_HOME at a TensorRT 8.6 or newer")


def _cubin_by_nvrtc(arch: int, nvrtc: Nvrtc) -> Path:
    options = ["--std=c++17", f"--gpu-architecture=sm_{arch}"]

    def build(target: Path) -> None:
        folder = plugin_sources()
        target.write_bytes(_nvrtc_compile(nvrtc, '#include "deform_kernel.cuh"\n', [*options, f"-I{folder}"]))

    return _cached(f"glip_deform_sm{arch}", ".cubin", ["nvrtc", nvrtc.version, *options], build)


def _nvrtc_compile(nvrtc: Nvrtc, source: str, options: Sequence[str]) -> bytes:
    library, program = ctypes.CDLL(str(nvrtc.path)), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"glip_deform.cu", 0, None, None)
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library.nvrtcCompileProgram(program, len(options), given)
        prefix = "nvrtcGetProgramLog" if failed else "nvrtcGetCUBIN"
        size = ctypes.c_size_t()
        getattr(library, f"{prefix}Size")(program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        getattr(library, prefix)(program, content)
        if failed:
            raise GlipError(_first_error(content.value.decode(errors="replace"), f"NVRTC {nvrtc.version}"))
        return content.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


# -- plumbing -------------------------------------------------------------------------------------------------------


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
        _check_owner(folder)
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


def _check_owner(folder: Path) -> None:
    """Refuse a cache folder in which someone else could have put a library (Windows keeps it in the user's profile).

    Raises:
        OutputError: it is another user's, or everyone may write to it.
    """
    if os.name != "posix":
        return
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise OutputError(
            f"cache folder {folder} belongs to another user (id {status.st_uid}); set {CACHE_VARIABLE} to your own"
        )
    if status.st_mode & stat.S_IWOTH:
        raise OutputError(f"cache folder {folder} can be written by every user; chmod o-w {folder}")


def _run(command: Sequence[str]) -> str:
    """Run a compiler; returns what it printed on stdout.

    Raises:
        GlipError: it does not start, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise GlipError(f"{command[0]} cannot be run ({error.strerror}); install another compiler") from None
    if done.returncode:
        raise GlipError(_first_error(done.stderr + done.stdout, command[0]))
    return done.stdout


def _first_error(output: str, compiler: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = next((line for line in lines if re.search(r"\b(error|fatal|cannot|undefined)\b", line)), None)
    what = told or (lines[-1] if lines else "no reason given")
    return f"{compiler} refuses the plugin's sources: {what[:300]}; try another version of it"
