"""The compilers of the deformable convolution: where they are, what they compile for, and how they are run.

nvcc 13 compiles for compute capability 7.5 and up. For older ones, and where there is no nvcc, NVRTC compiles the
kernels, which include no header but their own.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from glip_deploy.errors import EngineError, MissingPackage

__all__ = [
    "Nvcc",
    "Nvrtc",
    "cuda_headers",
    "find_host_compiler",
    "find_nvcc",
    "find_nvrtc",
    "find_tensorrt_headers",
    "run",
]

_SYSTEM_CUDA = Path("/usr/local/cuda")


def _oldest(cuda: int) -> int:
    """Return the lowest compute capability that compilers of a major CUDA version compile for."""
    return 75 if cuda >= 13 else 50


@dataclass(frozen=True)
class Nvcc:
    """NVIDIA's offline compiler."""

    path: Path
    version: str
    """13.0, say."""

    @property
    def oldest(self) -> int:
        """The lowest compute capability it compiles for."""
        return _oldest(int(self.version.split(".", maxsplit=1)[0]))


@dataclass(frozen=True)
class Nvrtc:
    """NVIDIA's compiler as a library."""

    path: Path
    version: str
    oldest: int
    """The lowest compute capability it compiles for."""

    def compile(self, source: str, options: Sequence[str]) -> bytes:
        """Return the machine code of CUDA source.

        Raises:
            EngineError: the compiler refuses it.
        """
        library, program = ctypes.CDLL(str(self.path)), ctypes.c_void_p()
        library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"glip_deform.cu", 0, None, None)
        try:
            words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = library.nvrtcCompileProgram(program, len(options), words)
            prefix = "nvrtcGetProgramLog" if failed else "nvrtcGetCUBIN"
            size = ctypes.c_size_t()
            getattr(library, f"{prefix}Size")(program, ctypes.byref(size))
            content = ctypes.create_string_buffer(size.value)
            getattr(library, prefix)(program, content)
            if failed:
                raise _refused(f"NVRTC {self.version}", content.value.decode(errors="replace"))
            return content.raw
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))


def _site_packages() -> tuple[Path, ...]:
    return tuple(Path(site) for site in dict.fromkeys(sysconfig.get_paths()[name] for name in ("platlib", "purelib")))


def _package_folders() -> Iterator[Path]:
    """Return where pip puts NVIDIA's packages: site-packages/nvidia/<cu13, cuda_nvrtc, ...>."""
    for site in _site_packages():
        yield from sorted((site / "nvidia").glob("cu*"), reverse=True)


def _cuda_homes() -> list[Path]:
    return [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]


def find_host_compiler() -> str:
    """Return the C++ compiler: $CXX, or c++, g++ or clang++ on the PATH.

    Raises:
        MissingPackage: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path is not None:
            return path
    raise MissingPackage("there is no C++ compiler on the PATH; install one (apt-get install g++) or name it in $CXX")


def find_nvcc() -> Nvcc:
    """Return the nvcc of $CUDA_HOME, of the PATH, of pip's packages, or of /usr/local/cuda.

    Raises:
        MissingPackage: there is none.
        EngineError: it does not run.
    """
    on_path = shutil.which("nvcc")
    candidates = [home / "bin" / "nvcc" for home in _cuda_homes()]
    candidates += [Path(on_path)] if on_path else []
    candidates += [folder / "bin" / "nvcc" for folder in (*_package_folders(), _SYSTEM_CUDA)]
    for path in candidates:
        if path.is_file() and os.access(path, os.X_OK):
            release = re.search(r"release (\d+\.\d+)", run([str(path), "--version"]))
            if release is None:
                raise EngineError(f"{path} --version names no release; point $CUDA_HOME at another CUDA toolkit")
            return Nvcc(path, release[1])
    raise MissingPackage(
        "there is no nvcc in $CUDA_HOME, on the PATH or among pip's packages; pip install nvidia-cuda-nvcc (CUDA 13),"
        " or install the CUDA toolkit"
    )


def find_nvrtc(arch: int) -> Nvrtc:
    """Return an NVRTC that compiles for a compute capability: of pip's packages, of $CUDA_HOME, or the system's.

    Args:
        arch: 80 for 8.0.

    Raises:
        MissingPackage: there is none.
    """
    folders = [folder / "lib" for folder in _package_folders()]
    folders += [home / sub for home in (*_cuda_homes(), _SYSTEM_CUDA) for sub in ("lib64", "lib")]
    names = [str(path) for folder in folders for path in sorted(folder.glob("libnvrtc.so.*"))]
    for name in (*names, "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        if arch >= _oldest(major.value):
            return Nvrtc(Path(name), f"{major.value}.{minor.value}", _oldest(major.value))
    package = "nvidia-cuda-nvrtc-cu12" if arch < _oldest(13) else "nvidia-cuda-nvrtc"
    raise MissingPackage(f"there is no NVRTC that compiles for compute capability {arch / 10}; pip install {package}")


def find_tensorrt_headers(*, of_8: bool = False) -> Path:
    """Return the folder of NvInfer.h: $TENSORRT_HOME/include, the package kernel-lens (10.14), or the system's.

    Args:
        of_8: headers of TensorRT 8, which has another interface for plugins than 10 and later; those of one version
            from 10 on serve all of them.

    Raises:
        MissingPackage: there is none.
    """
    home = os.environ.get("TENSORRT_HOME")
    folders = [Path(home) / "include"] if home else []
    folders += [site / "kernel_lens" / "include" / "tensorrt" for site in _site_packages()]
    folders += [Path("/usr/include/x86_64-linux-gnu"), Path("/usr/include/aarch64-linux-gnu"), Path("/usr/include")]
    for folder in folders:
        if (folder / "NvInfer.h").is_file() and (_headers_major(folder) < 10) is of_8:
            return folder
    where = "is not in $TENSORRT_HOME/include nor in the system"
    if of_8:
        raise MissingPackage(f"NvInfer.h of TensorRT 8.6 {where}; point $TENSORRT_HOME at the TensorRT 8.6 archive")
    raise MissingPackage(
        f"NvInfer.h of TensorRT 10 or newer {where}; pip install kernel-lens (10.14), or point $TENSORRT_HOME at a"
        " TensorRT"
    )


def cuda_headers() -> Path:
    """Return the folder of cuda_runtime_api.h, which TensorRT's headers include; nvcc knows its own.

    Raises:
        MissingPackage: there is none.
    """
    for home in (*_cuda_homes(), *_package_folders(), _SYSTEM_CUDA):
        if (home / "include" / "cuda_runtime_api.h").is_file():
            return home / "include"
    raise MissingPackage("there are no CUDA headers here; pip install nvidia-cuda-runtime, or set $CUDA_HOME")


def _headers_major(folder: Path) -> int:
    """Return TensorRT's major version, which NvInferVersion.h has under another name from 10.13 on.

    Raises:
        EngineError: the file names no version.
    """
    text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    for name in ("TRT_MAJOR_ENTERPRISE", "NV_TENSORRT_MAJOR"):
        found = re.search(rf"^#define {name} (\d+)", text, re.MULTILINE)
        if found is not None:
            return int(found[1])
    raise EngineError(f"{folder}/NvInferVersion.h names no version; point $TENSORRT_HOME at a TensorRT 8.6 or newer")


def run(command: Sequence[str]) -> str:
    """Run a compiler and return what it printed on standard output.

    Raises:
        EngineError: it does not start, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise EngineError(f"{command[0]} cannot be run ({error.strerror}); install another compiler") from None
    if done.returncode:
        raise _refused(command[0], done.stderr + done.stdout)
    return done.stdout


def _refused(compiler: str, output: str) -> EngineError:
    """Return the error for a compiler's output, with the first line that is one, or the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    fatal = (line for line in lines if re.search(r"\b(error|fatal|cannot|undefined)\b", line))
    what = next(fatal, lines[-1] if lines else "no reason given")
    return EngineError(f"{compiler} refuses the plugin's sources: {what[:300]}; try another version of it")
