"""What is asked of each TensorRT version, on a module that only records it: none of them but TensorRT-RTX runs here."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest
from glip_engines import trt as module_under_test
from glip_engines.flavours import Flavour, Gpu
from glip_engines.trt import GraphJob, Settings, Toolkit

from glip_deploy.errors import EngineError, EngineMismatch, OptionError

KINDS = ("CONVOLUTION", "SOFTMAX", "SHAPE", "CONSTANT", "CAST", "SHUFFLE", "IDENTITY", "MATRIX_MULTIPLY")


def members(*names):
    return SimpleNamespace(__members__={name: name for name in names}, **{name: name for name in names})


class Layer:
    def __init__(self, kind, *types):
        self.type, self.name, self._types = kind, kind.lower(), types
        self.num_outputs, self.precision, self.output_types = len(types), None, {}

    def get_output(self, k):
        return SimpleNamespace(dtype=self._types[k], name=f"{self.name}_{k}")

    def set_output_type(self, k, dtype):
        self.output_types[k] = dtype


class FakeTensorRT:
    """The part of the Python module that a build uses; `log` is what it was asked for."""

    float32 = "float32"

    def __init__(self, version, layers=()):
        self.log, self.__version__, self._layers = [], version, list(layers)
        major = int(version.split(".")[0])
        self.ILogger = type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1), "__init__": lambda self: None})
        flags = ["FP16", "TF32", "OBEY_PRECISION_CONSTRAINTS"] if major < 11 else ["TF32", "REQUIRE_USER_ALLOCATION"]
        self.BuilderFlag = members(*flags)
        kinds = {"EXPLICIT_BATCH": 0} if major < 10 else {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
        self.NetworkDefinitionCreationFlag = SimpleNamespace(__members__=kinds if major < 11 else {})
        self.OnnxParserFlag = members("NATIVE_INSTANCENORM")
        self.LayerType = members(*KINDS)
        self.PreviewFeature = members("PROFILE_SHARING_0806") if major < 10 else members()
        self.MemoryPoolType = members("WORKSPACE")

    def Builder(self, log):  # noqa: N802
        def config():
            return SimpleNamespace(
                set_flag=lambda flag: self.log.append(("set", flag)),
                clear_flag=lambda flag: self.log.append(("clear", flag)),
                add_optimization_profile=lambda profile: self.log.append(("profile", profile.shapes)),
                set_preview_feature=lambda feature, on: self.log.append(("preview", feature)),
                set_memory_pool_limit=lambda pool, size: self.log.append((pool, size)),
                create_timing_cache=lambda content: content,
                set_timing_cache=lambda cache, ignore: cache != b"another GPU",
                get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timings"),
            )

        def network(flags):
            self.log.append(("network", flags))
            tensor = SimpleNamespace(name="x", dtype=SimpleNamespace(name="FLOAT"), shape=(1, 2))
            return SimpleNamespace(
                num_layers=len(self._layers),
                get_layer=lambda i: self._layers[i],
                num_inputs=1,
                num_outputs=0,
                get_input=lambda i: tensor,
            )

        def profile():
            shapes = {}
            return SimpleNamespace(shapes=shapes, set_shape=lambda name, *sides: shapes.__setitem__(name, sides))

        return SimpleNamespace(
            create_builder_config=config,
            create_network=network,
            create_optimization_profile=profile,
            build_serialized_network=lambda network, config: b"plan",
        )

    def OnnxParser(self, network, log):  # noqa: N802
        return SimpleNamespace(
            set_flag=lambda flag: self.log.append(("parser", flag)),
            parse_from_file=lambda path: self.log.append(("parse", path)) or True,
        )


@pytest.fixture
def build(monkeypatch, tmp_path):
    monkeypatch.setattr(module_under_test, "current_gpu", lambda: Gpu("Some GPU", 80))
    monkeypatch.setattr("glip_engines.flavours.installed", lambda flavour: True)
    monkeypatch.setattr(module_under_test, "single_tensors", lambda file: frozenset({"softmax_0"}))

    def run(version, precision="fp16", layers=(), **settings):
        fake = FakeTensorRT(version, layers)
        monkeypatch.setitem(sys.modules, "tensorrt", fake)
        monkeypatch.setattr(module_under_test, "_LOGGERS", {})
        toolkit = Toolkit(Settings(Flavour.TENSORRT, precision, **settings))
        built = toolkit.build(
            GraphJob("x.onnx", str(tmp_path / "x.plan"), ({"x": ((1, 2),) * 3},)), lambda fraction, phase: True
        )
        assert (tmp_path / "x.plan").read_bytes() == b"plan"
        assert built.inputs[0].dtype == "float32"
        return fake.log

    return run


@pytest.mark.parametrize(("version", "flags"), [("8.6.1", 1 << 0), ("10.3.0", 1 << 1), ("11.1.0", 0)])
def test_networks_are_strongly_typed_where_possible(build, version, flags):
    log = build(version)
    assert ("network", flags) in log
    assert (("set", "FP16") in log) == (("set", "OBEY_PRECISION_CONSTRAINTS") in log) == (version == "8.6.1")


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "11.1.0"])
def test_group_norms_are_no_plugins(build, version):
    """8.6 uses a plugin for InstanceNormalization unless it is told otherwise before it parses."""
    log = build(version)
    assert log.index(("parser", "NATIVE_INSTANCENORM")) < log.index(("parse", "x.onnx"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "11.1.0"])
def test_fp32_is_not_tf32(build, version, precision):
    assert ("clear", "TF32") in build(version, precision)


def test_engines_that_can_be_recorded_as_cuda_graphs(build):
    """TensorRT-RTX needs to be asked for it; a flag by that name in another version means the same."""
    assert ("set", "REQUIRE_USER_ALLOCATION") in build("11.1.0")


def test_fp32_islands_are_pinned_where_typing_is_weak(build):
    """Precision and output type of whatever computes in fp32, so that 8.6 cannot choose fp16 for them."""
    island, half, cast = (
        Layer("CONVOLUTION", "float32"),
        Layer("MATRIX_MULTIPLY", "float16"),
        Layer("CAST", "float32"),
    )
    build("8.6.1", layers=[island, half, cast])
    assert (island.precision, island.output_types) == ("float32", {0: "float32"})
    assert (half.precision, half.output_types, cast.precision) == (None, {}, None)
    # Positions on their way to the sampling, which a reshape in fp16 would round; a tensor that the graph has in fp32,
    # whatever the network says.
    moved, said = Layer("SHUFFLE", "float32"), Layer("SOFTMAX", "float16")
    build("8.6.1", layers=[moved, said])
    for layer in (moved, said):
        assert (layer.precision, layer.output_types) == ("float32", {0: "float32"})
    build("10.3.0", layers=[typed := Layer("CONVOLUTION", "float32")])
    assert typed.precision is None
    build("8.6.1", "fp32", layers=[free := Layer("CONVOLUTION", "float32")])
    assert free.precision is None


def test_8_6_has_no_bf16(build):
    with pytest.raises(OptionError, match=r"tensorrt 8\.6\.1 has no bf16; use --precision fp16"):
        build("8.6.1", "bf16")


def test_the_full_tensorrt_builds_for_its_own_gpu(build):
    with pytest.raises(OptionError, match="builds for the GPU of its machine; leave out --arch"):
        build("10.3.0", arch="SM80")


@pytest.mark.parametrize(("version", "compute_capability"), [("10.5.0", 70), ("8.6.1", 120)])
def test_a_gpu_that_this_version_does_not_support(build, monkeypatch, version, compute_capability):
    monkeypatch.setattr(module_under_test, "current_gpu", lambda: Gpu("Some GPU", compute_capability))
    with pytest.raises(
        EngineError, match=rf"tensorrt {version} is too (new|old) for Some GPU \(SM{compute_capability}\)"
    ):
        build(version)


def test_profiles_and_limits(build):
    log = build("10.3.0", workspace=1 << 20)
    assert ("profile", {"x": ((1, 2),) * 3}) in log
    assert ("WORKSPACE", 1 << 20) in log


def test_a_timing_cache_is_kept_up_to_date(build, tmp_path):
    cache = tmp_path / "cache"
    build("10.3.0", timing_cache=str(cache))
    assert cache.read_bytes() == b"timings"
    cache.write_bytes(b"another GPU")
    with pytest.raises(EngineMismatch, match=r"timing cache .* is of another GPU or TensorRT; delete it"):
        build("10.3.0", timing_cache=str(cache))


@pytest.mark.parametrize(("version", "look_up"), [("8.6.1", "get_plugin_creator"), ("10.3.0", "get_creator")])
def test_a_library_without_the_plugin(monkeypatch, version, look_up):
    fake = FakeTensorRT(version)
    asked = []
    fake.init_libnvinfer_plugins = lambda log, namespace: None
    fake.get_plugin_registry = lambda: SimpleNamespace(
        load_library=lambda path: ctypes.c_void_p(1), **{look_up: lambda *words: asked.append(words)}
    )
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(module_under_test, "_LOGGERS", {})
    monkeypatch.setattr(module_under_test, "current_gpu", lambda: Gpu("Some GPU", 80))
    monkeypatch.setattr("glip_engines.flavours.installed", lambda flavour: True)
    with pytest.raises(EngineError, match="it holds no TensorRT plugin glip::ModulatedDeformConv 3"):
        Toolkit(Settings(Flavour.TENSORRT, "fp16")).load_plugin("lib.so")
    assert asked == [("ModulatedDeformConv", "3", "glip")]
