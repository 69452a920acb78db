"""The kernels compile for every GPU they promise, the plugin against TensorRT's headers; what is missing is said."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from glip_engines import compile as deform
from glip_engines import compilers
from glip_engines.compile import ARCHITECTURES, build_cubin, build_library
from glip_engines.compilers import Nvcc, find_host_compiler, find_nvcc, find_nvrtc, find_tensorrt_headers

from glip_deploy.errors import EngineError, GlipError, MissingPackage, OutputError
from glip_deploy.files import sha256_of

KERNELS = [
    *(f"glip_deform_{data}_{tile}" for data in ("f16", "bf16") for tile in ("wide", "medium", "small", "scalar")),
    "glip_deform_f32_scalar",
    *(f"glip_deform_{job}_{data}" for job in ("pack", "transpose") for data in ("f32", "f16", "bf16")),
]


def missing(*finders):
    """Why a test cannot run here, or nothing."""
    for finder in finders:
        try:
            finder()
        except GlipError as error:
            return str(error)
    return ""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIP_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plugin"


def compiler_for(arch):
    return find_nvcc if not missing(find_nvcc) and arch >= find_nvcc().oldest else lambda: find_nvrtc(arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile(arch):
    reason = missing(compiler_for(arch))
    if reason:
        pytest.skip(reason)
    cubin = build_cubin(arch).read_bytes()
    assert cubin.startswith(b"\x7fELF")
    assert [name for name in KERNELS if f".text.{name}\0".encode() not in cubin] == []


def test_kernels_compile_where_there_is_no_nvcc(monkeypatch):
    """NVRTC has no header but ours."""
    reason = missing(lambda: find_nvrtc(80))
    if reason:
        pytest.skip(reason)

    def no_nvcc():
        raise MissingPackage("hidden")

    monkeypatch.setattr(deform, "find_nvcc", no_nvcc)
    assert build_cubin(80).read_bytes().startswith(b"\x7fELF")


def test_library_exports_the_interface_and_nothing_else():
    reason = missing(find_nvcc, find_host_compiler)
    if reason:
        pytest.skip(reason)
    library = ctypes.CDLL(str(build_library([80])))
    for name in ("problem_error", "packed_weight_bytes", "pack_weights", "workspace_bytes", "launch"):
        assert getattr(library, f"glip_deform_{name}")
    assert not hasattr(library, "cudaMalloc")


def test_a_second_build_is_the_first_one(cache):
    reason = missing(find_host_compiler)
    if reason:
        pytest.skip(reason)
    first = deform.build_host_library()
    stamp = first.stat().st_mtime_ns
    assert deform.build_host_library() == first
    assert first.stat().st_mtime_ns == stamp
    assert sorted(path.name for path in cache.iterdir()) == [first.name, f"{first.name}.sha256"]


needs_host_compiler = pytest.mark.skipif(
    bool(missing(find_host_compiler)), reason=missing(find_host_compiler) or "there is a compiler"
)


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
    monkeypatch.setattr(deform.os, "geteuid", lambda: user + 1)
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
    reason = missing(find_host_compiler)
    if reason:
        pytest.skip(reason)
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


def test_other_options_are_another_file():
    reason = missing(find_host_compiler)
    if reason:
        pytest.skip(reason)
    assert deform.build_host_library() != deform.build_host_library(defines=["UNUSED=1"])


def test_a_failed_build_leaves_nothing(cache, monkeypatch):
    reason = missing(find_host_compiler)
    if reason:
        pytest.skip(reason)
    with pytest.raises(GlipError, match="refuses the plugin's sources") as caught:
        deform.build_host_library("host/deform_emulated.cpp", ["GLIP_DEFORM_EMULATED=nonsense("])
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


@needs_host_compiler
def test_without_a_home_the_cache_must_be_named(monkeypatch):
    monkeypatch.setattr(deform, "cache_folder", lambda *parts: None)
    with pytest.raises(OutputError, match=r"no home folder .*set GLIP_DEPLOY_CACHE"):
        deform.build_host_library()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    reason = missing(find_host_compiler)
    if reason:
        pytest.skip(reason)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLIP_DEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"cannot be written .*set GLIP_DEPLOY_CACHE"):
        deform.build_host_library()


def hide_compilers(monkeypatch, tmp_path):
    monkeypatch.setattr(compilers, "_package_folders", lambda: iter([]))
    monkeypatch.setattr(compilers, "_SYSTEM_CUDA", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)


def test_missing_compilers_say_what_to_install(monkeypatch, tmp_path):
    hide_compilers(monkeypatch, tmp_path)
    with pytest.raises(GlipError, match="pip install nvidia-cuda-nvcc"):
        find_nvcc()
    with pytest.raises(GlipError, match=r"apt-get install g\+\+"):
        find_host_compiler()


@pytest.mark.parametrize(("arch", "package"), [(60, "nvidia-cuda-nvrtc-cu12"), (90, "nvidia-cuda-nvrtc$")])
def test_missing_nvrtc_names_the_package_that_has_it(monkeypatch, tmp_path, arch, package):
    hide_compilers(monkeypatch, tmp_path)

    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(compilers.ctypes, "CDLL", no_library)
    with pytest.raises(GlipError, match=package):
        find_nvrtc(arch)


def test_cuda_home_comes_first(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc() == Nvcc(nvcc, "12.4")
    assert find_nvcc().oldest < 60


def test_architectures_nvcc_does_not_know(monkeypatch):
    monkeypatch.setattr(deform, "find_nvcc", lambda: Nvcc(Path("nvcc"), "13.0"))
    with pytest.raises(GlipError, match=r"compute capability 7\.5 and up, not 6\.0"):
        build_library([60, 80])


def test_importing_starts_no_compiler():
    code = "import glip_engines.compile, sys; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    environment = {**os.environ, "PATH": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


# -- TensorRT -------------------------------------------------------------------------------------------------------

GOOD = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1]}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The IPluginV3 library, for one architecture."""
    reason = missing(find_nvcc, find_tensorrt_headers, find_host_compiler)
    if reason:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIP_DEPLOY_CACHE", str(tmp_path_factory.mktemp("plugin")))
        return build_library([80], tensorrt=True)


def test_plugin_exports_what_tensorrt_looks_for(plugin):
    library = ctypes.CDLL(str(plugin))
    for name in ("getCreators", "setLoggerFinder", "glip_deform_launch"):
        assert getattr(library, name)
    count = ctypes.c_int32()
    library.getCreators.restype = ctypes.POINTER(ctypes.c_void_p)
    assert library.getCreators(ctypes.byref(count))[0]
    assert count.value == 1


def one_node(path, attributes, data="fp16", channels=(32, 24), offsets=18, inputs="xwobm", domain="glip"):
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    kind, array = {"fp16": (TensorProto.FLOAT16, np.float16), "fp32": (TensorProto.FLOAT, np.float32)}[data]
    node = helper.make_node("ModulatedDeformConv", list(inputs), ["y0"], domain=domain, name="dcn", **attributes)
    sides = ["height", "width"]
    values = [
        helper.make_tensor_value_info(name, of, [1, size, *sides])
        for name, of, size in (
            ("x0", kind, channels[0]),
            ("o", TensorProto.FLOAT, offsets),
            ("m", TensorProto.FLOAT, 9),
            ("y", kind, channels[1]),
        )
    ]
    weights = [
        numpy_helper.from_array(np.ones((channels[1], channels[0], 3, 3), array), "w"),
        numpy_helper.from_array(np.ones(channels[1], array), "b"),
    ]
    around = [helper.make_node("Relu", ["x0"], ["x"]), node, helper.make_node("Relu", ["y0"], ["y"])]
    used = [value for value in values[:3] if value.name == "x0" or value.name in inputs]
    graph = helper.make_graph(around, "one", used, values[3:], [w for w in weights if w.name in inputs])
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("glip", 1)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return {
        value.name: tuple(
            (1, value.type.tensor_type.shape.dim[1].dim_value, *hw) for hw in ((8, 8), (20, 24), (99, 99))
        )
        for value in used
    }


def build_engine(plugin, folder, **node):
    from glip_engines.flavours import Flavour, installed
    from glip_engines.trt import GraphJob, Settings
    from glip_engines.worker import Worker

    if not installed(Flavour.RTX):
        pytest.skip("tensorrt-rtx is not installed: pip install 'glip-deploy[tensorrt-rtx]'")
    profile = one_node(folder / "one.onnx", node.pop("attributes", GOOD), **node)
    with Worker(Settings(Flavour.RTX, node.get("data", "fp16"), "SM80")) as worker:
        worker.load_plugin(plugin)
        job = GraphJob(str(folder / "one.onnx"), str(folder / "one.plan"), (profile,))
        return worker.build(job, lambda fraction, phase: None)


@pytest.mark.parametrize(
    "node",
    [
        {},
        {"data": "fp32"},
        {"attributes": {}},
        {"inputs": "xwo"},
        {"inputs": "xwob"},
        {"channels": (12, 10)},
        # As TensorRT 8.6 and 10.0 to 10.9 look a plugin up, which do not read the domain.
        {"attributes": {**GOOD, "plugin_namespace": "glip", "plugin_version": "1"}, "domain": ""},
        {"attributes": {**GOOD, "strides": [2, 2], "dilations": [1, 1], "group": 1, "offset_group": 1}},
    ],
    ids=str,
)
def test_tensorrt_builds_engines_with_the_plugin(plugin, tmp_path, node):
    built = build_engine(plugin, tmp_path, **node)
    assert built.outputs[0].shape == (1, node.get("channels", (32, 24))[1], -1, -1)
    assert built.outputs[0].dtype == {"fp32": "float32"}.get(node.get("data"), "float16")
    assert b"ModulatedDeformConv" in (tmp_path / "one.plan").read_bytes()


@pytest.mark.parametrize(
    "node",
    [
        {"attributes": {**GOOD, "group": 2}},
        {"attributes": {**GOOD, "offset_group": 2}},
        {"attributes": {**GOOD, "kernel_shape": [5, 5]}},
        {"attributes": {**GOOD, "strides": [0, 1]}},
        {"attributes": {**GOOD, "pads": [1, 1, -1, 1]}},
        {"offsets": 20},
    ],
    ids=str,
)
def test_tensorrt_refuses_what_the_plugin_has_not(plugin, tmp_path, node):
    with pytest.raises(GlipError):
        build_engine(plugin, tmp_path, **node)
