"""The kernels and the plugin are compiled for the GPUs they are written for, and kept in the user's cache."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest
from engine_needs import missing, needs, skip_without
from glip_engines import compile as deform
from glip_engines import compilers
from glip_engines.compile import ARCHITECTURES, build_cubin, build_library
from glip_engines.compilers import Nvcc, cuda_headers, find_host_compiler, find_nvcc, find_nvrtc, find_tensorrt_headers
from glip_engines.deform_abi import DataType, Layout, Level, Shape, problem
from glip_engines.flavours import Dialect, Flavour
from kernels.budget import instructions, over_budget, read_budget

from glip_deploy.errors import EngineError, MissingPackage, OutputError
from glip_deploy.files import sha256_of

needs_host_compiler = needs(find_host_compiler)

KERNELS = [
    *(f"glip_deform_{data}_{tile}" for data in ("f16", "bf16") for tile in ("wide", "medium", "small", "scalar")),
    "glip_deform_f32_scalar",
    *(f"glip_deform_{job}_{data}" for job in ("pack", "transpose") for data in ("f32", "f16", "bf16")),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIP_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plugin"


def compiler_for(arch):
    return find_nvcc if not missing(find_nvcc) and arch >= find_nvcc().oldest else lambda: find_nvrtc(arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spilling_registers(arch, monkeypatch):
    """For every GPU in the list; ptxas says of each kernel how many bytes it spills."""
    skip_without(compiler_for(arch))
    reports = []
    if compiler_for(arch) is find_nvcc:
        run = compilers.subprocess.run
        monkeypatch.setattr(deform, "_FLAGS", (*deform._FLAGS, "-Xptxas", "-v"))
        monkeypatch.setattr(
            compilers.subprocess, "run", lambda *words, **options: reports.append(run(*words, **options)) or reports[-1]
        )
        cubin = build_cubin(arch).read_bytes()
        report = "".join(done.stderr for done in reports)
    else:
        cubin = build_cubin(arch).read_bytes()
        report = nvrtc_log(arch)
    assert cubin.startswith(b"\x7fELF")
    assert [name for name in KERNELS if f".text.{name}\0".encode() not in cubin] == []
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0", "0")] * len(KERNELS)
    counts = instructions(cubin, arch)
    assert set(counts) == set(KERNELS)
    assert over_budget(arch, counts, read_budget()) == [], "python benchmarks/kernels/budget.py says more"


def test_a_kernel_that_grows_is_over_its_budget():
    budget = read_budget()
    assert set(budget) == {str(arch) for arch in ARCHITECTURES}
    kept = budget["80"]
    assert over_budget(80, kept, budget) == []
    name = "glip_deform_f16_wide"
    grown = {**kept, name: kept[name] + 1}
    assert over_budget(80, grown, budget) == [f"SM80 {name}: {kept[name] + 1} instructions, {kept[name]} allowed"]
    assert over_budget(80, {**kept, "new": 1}, budget) == ["SM80 new: 1 instructions, no budget allowed"]
    assert over_budget(80, {}, {"80": {"old": 5}}) == ["SM80 old: is missing"]


def nvrtc_log(arch):
    library, program = ctypes.CDLL(str(find_nvrtc(arch).path)), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), b'#include "deform_kernel.cuh"\n', b"x.cu", 0, None, None)
    words = ["--std=c++17", f"--gpu-architecture=sm_{arch}", f"-I{deform.plugin_sources()}", "--ptxas-options=-v"]
    options = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    assert library.nvrtcCompileProgram(program, len(words), options) == 0
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode()


@pytest.mark.parametrize(
    ("arch", "code"),
    [
        (75, "arch=compute_75,code=sm_75"),
        (87, "arch=compute_87,code=sm_87"),  # Orin does not run code of 8.6
        (88, "arch=compute_80,code=compute_80"),
        (107, "arch=compute_80,code=compute_80"),
        (130, "arch=compute_80,code=compute_80"),
    ],
)
def test_a_gpu_gets_its_own_code_or_ptx(arch, code):
    assert deform.code_for(arch) == code


@pytest.mark.parametrize("arch", [53, 62, 72])
def test_a_gpu_the_kernels_are_not_written_for(arch):
    with pytest.raises(EngineError, match=rf"no kernels for SM{arch}; it has them for SM60, .*; use --form native"):
        deform.code_for(arch)


def test_ptx_for_a_gpu_that_is_not_listed():
    skip_without(find_nvcc, find_host_compiler)
    library = build_library([88]).read_bytes()
    assert b"sm_80" not in library and b"sm_86" not in library
    assert ctypes.CDLL(str(build_library([88]))).glip_deform_launch


def test_kernels_compile_where_there_is_no_nvcc(monkeypatch):
    """NVRTC has no header but ours."""
    skip_without(lambda: find_nvrtc(80))

    def no_nvcc():
        raise MissingPackage("hidden")

    monkeypatch.setattr(deform, "find_nvcc", no_nvcc)
    assert build_cubin(80).read_bytes().startswith(b"\x7fELF")


def test_library_exports_the_interface_and_nothing_else():
    skip_without(find_nvcc, find_host_compiler)
    library = ctypes.CDLL(str(build_library([75])))
    for name in ("problem_error", "packed_weight_bytes", "pack_weights", "workspace_bytes", "launch"):
        assert getattr(library, f"glip_deform_{name}")
    assert not hasattr(library, "cudaMalloc")


def test_a_second_build_reuses_the_first(cache):
    skip_without(find_host_compiler)
    first = deform.build_host_library()
    stamp = first.stat().st_mtime_ns
    assert deform.build_host_library() == first
    assert first.stat().st_mtime_ns == stamp
    assert sorted(path.name for path in cache.iterdir()) == [first.name, f"{first.name}.sha256"]


@needs_host_compiler
@pytest.mark.parametrize("record", ["0" * 64, "", None], ids=["wrong", "empty", "missing"])
def test_a_cached_library_without_its_recorded_hash_is_built_again(record):
    first = deform.build_host_library()
    note = first.with_name(f"{first.name}.sha256")
    first.write_bytes(b"something else")
    if record is None:
        note.unlink()
    else:
        note.write_text(record)
    assert deform.build_host_library() == first
    assert first.read_bytes().startswith(b"\x7fELF")
    assert note.read_text() == sha256_of(first)


@needs_host_compiler
def test_a_cached_library_that_was_exchanged_is_built_again():
    first = deform.build_host_library()
    first.write_bytes(b"planted")
    assert deform.build_host_library().read_bytes().startswith(b"\x7fELF")


@needs_host_compiler
def test_a_cache_folder_of_another_user_is_refused(cache, monkeypatch):
    cache.mkdir(parents=True)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(OutputError, match=r"belongs to another user .*GLIP_DEPLOY_CACHE"):
        deform.build_host_library()
    assert list(cache.iterdir()) == []


@needs_host_compiler
def test_a_cache_folder_that_everyone_may_write_to_is_refused(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(OutputError, match=r"can be written by every user; chmod o-w"):
        deform.build_host_library()


def test_the_cache_folder_is_private(cache):
    skip_without(find_host_compiler)
    deform.build_host_library()
    assert cache.stat().st_mode & 0o777 == 0o700


def test_the_sources_come_from_the_package_or_from_the_checkout(tmp_path, monkeypatch):
    """A wheel has them inside the package; a folder "plugin" beside the package is someone else's there."""
    assert deform.plugin_sources() == Path(deform.__file__).parents[1] / "plugin"
    package = tmp_path / "site-packages" / "glip_engines"
    monkeypatch.setattr(deform, "__file__", str(package / "compile.py"))
    with pytest.raises(EngineError, match="plugin's sources is missing; install glip-deploy again"):
        deform.plugin_sources()
    for folder in (package.parent / "plugin", package / "plugin"):
        folder.mkdir(parents=True)
        (folder / "glip_deform.h").touch()
    assert deform.plugin_sources() == package / "plugin"


def test_other_options_make_another_file():
    skip_without(find_host_compiler)
    assert deform.build_host_library() != deform.build_host_library(defines=["UNUSED=1"])


def test_a_failed_build_leaves_nothing(cache, monkeypatch):
    skip_without(find_host_compiler)
    with pytest.raises(EngineError, match="refuses the plugin's sources") as caught:
        deform.build_host_library("host/deform_emulated.cpp", ["GLIP_DEFORM_EMULATED=nonsense("])
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


@needs_host_compiler
def test_without_a_home_the_cache_must_be_named(monkeypatch):
    monkeypatch.setattr(deform, "cache_folder", lambda *parts: None)
    with pytest.raises(OutputError, match=r"no home folder .*set GLIP_DEPLOY_CACHE"):
        deform.build_host_library()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    skip_without(find_host_compiler)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLIP_DEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"cannot be written .*set GLIP_DEPLOY_CACHE"):
        deform.build_host_library()


def test_architectures_nvcc_does_not_know(monkeypatch):
    monkeypatch.setattr(deform, "find_nvcc", lambda: Nvcc(Path("nvcc"), "13.0"))
    with pytest.raises(EngineError, match=r"compute capability 7\.5 and up, not 6\.0"):
        build_library([60, 80])


@pytest.mark.parametrize(
    ("version", "adapter", "headers"),
    [("8.6.1", "adapter_v2.cpp", "8"), ("10.3.0", "adapter_v3.cpp", "10"), ("11.1.0", "adapter_v3.cpp", "10")],
)
def test_the_adapter_is_that_of_the_tensorrt_it_is_for(monkeypatch, tmp_path, version, adapter, headers):
    """Whichever headers are found first: those of 8 describe another interface than those of 10 and later."""
    for major in ("8", "10"):
        folder = tmp_path / major / "kernel_lens" / "include" / "tensorrt"
        folder.mkdir(parents=True)
        (folder / "NvInfer.h").touch()
        (folder / "NvInferVersion.h").write_text(f"#define NV_TENSORRT_MAJOR {major}\n")
    monkeypatch.setattr(compilers, "_site_packages", lambda: (tmp_path / "8", tmp_path / "10"))
    monkeypatch.delenv("TENSORRT_HOME", raising=False)
    monkeypatch.setattr(deform, "find_nvcc", lambda: Nvcc(Path("nvcc"), "12.9"))
    commands = []

    def record(command):
        commands.append(command)
        Path(command[command.index("-o") + 1]).write_bytes(b"library")
        return ""

    monkeypatch.setattr(deform, "run", record)
    build_library([80], tensorrt=Dialect(Flavour.TENSORRT, version, 80))
    (command,) = commands
    assert [Path(word).name for word in command if word.endswith(".cpp")] == [adapter]
    assert str(tmp_path / headers / "kernel_lens" / "include" / "tensorrt") in command


@pytest.fixture(scope="module")
def without_a_gpu(tmp_path_factory):
    """The library linked to a CUDA runtime that only counts what it is asked for."""
    skip_without(find_nvcc, find_host_compiler)
    folder = tmp_path_factory.mktemp("fake")
    fake = Path(__file__).with_name("fake_cudart.cpp")
    flags = ["-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none", "-arch=sm_80"]
    sources = [str(deform.plugin_sources() / "deform_kernel.cu"), str(fake)]
    compilers.run([str(find_nvcc().path), *flags, "-o", str(folder / "lib.so"), *sources])
    return ctypes.CDLL(str(folder / "lib.so"))


def test_shared_memory_is_asked_for_at_every_launch(without_a_gpu):
    """It belongs to the context, and a second context of the same device (PyCUDA's, say) looks like the first."""
    library, buffer = without_a_gpu, ctypes.create_string_buffer(64)
    address = ctypes.addressof(buffer) + 16 - ctypes.addressof(buffer) % 16
    shape = Shape(256, 256, data_type=DataType.F16, x_layout=Layout.NHWC)
    given = problem(shape, [Level(address, address, None, address, (100, 168), (100, 168))], address)
    for launch in (1, 2, 3):
        assert library.glip_deform_launch(ctypes.byref(given), None, ctypes.c_ulonglong(0), None) == 0
        assert library.fake_launches() == library.fake_opted_in() == launch
    assert library.fake_largest_shared_memory() > 48 * 1024


@pytest.mark.parametrize("adapter", ["adapter_v2.cpp", "adapter_v3.cpp"])
def test_adapters_compile_against_the_headers_at_hand(adapter):
    """adapter_v2.cpp is for TensorRT 8.6, whose headers no registry has; 10.14 still declares its interface."""
    skip_without(find_host_compiler, find_tensorrt_headers, cuda_headers)
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations"]
    flags += [word for folder in (find_tensorrt_headers(), cuda_headers()) for word in ("-isystem", str(folder))]
    compilers.run([find_host_compiler(), *flags, str(deform.plugin_sources() / adapter)])
