"""The script for whoever has a GPU: all of it that a CPU can run."""

import copy
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks" / "kernels"
sys.path.insert(0, str(SCRIPTS))

import check_kernels  # noqa: E402
from floors import LAYERS, calls, floor_of, total_floor  # noqa: E402
from glip_bench.limits.hardware import HARDWARE  # noqa: E402
from glip_export.model.config import GlipConfig  # noqa: E402
from glip_export.model.dyhead import DyConv  # noqa: E402
from glip_export.model.glip import Glip, normalise  # noqa: E402
from half_model import HalfImageBranch, Inputs, relative_error, stages  # noqa: E402
from kernel import KernelDyConv, MapLevel, convolve_in_torch, use_kernel, with_library  # noqa: E402
from tiny_glip import tiny_config  # noqa: E402

from glip_deploy.errors import GlipError  # noqa: E402


@pytest.mark.parametrize("size", [(800, 1344), (480, 640), (96, 160)])
def test_the_shapes_are_those_the_model_calls(size):
    seen = Counter()

    def note(x, offset, mask, weight, bias, stride=1):
        seen[tuple(x.shape[2:]), tuple(offset.shape[2:]), stride] += 1
        return x.new_empty(x.shape[0], weight.shape[0], *offset.shape[2:])

    with torch.device("meta"):
        model = Glip(GlipConfig(), deform=note)
        features = model.backbone(torch.empty(1, *size, 3))
        convolve = next(module for module in model.modules() if isinstance(module, DyConv))
        convolve(features)
    expected = Counter()
    for call in calls(*size):
        expected[call.size, call.out, call.stride] += call.times
    assert seen == expected and sum(expected.values()) == 13
    assert LAYERS["GLIP-T"] == sum(isinstance(module, DyConv) for module in model.modules())


def test_the_work_is_the_known_count():
    """127.3 GMAC of DyConv, the convolutions that make offsets and masks included."""
    pixels = sum(call.out[0] * call.out[1] for call in calls() if call.stride == 1)
    offsets = pixels * 27 * 256 * 9
    layer = sum(call.macs * call.times for call in calls())
    assert 6 * (layer + offsets) / 1e9 == pytest.approx(127.3, rel=2e-3)


def test_a_floor_is_the_longer_of_its_two_times():
    first = calls()[0]
    assert (first.out, first.stride, first.times) == ((100, 168), 1, 1)
    floor = floor_of(first, HARDWARE["H200"])
    assert floor.arithmetic == pytest.approx(2 * 16800 * 256 * 256 * 9 / 989e12)
    values, positions = (16800 * 512 + 256 * (2304 + 1)) * 2, 16800 * 27 * 4
    assert floor.bytes == pytest.approx((values + positions) / 4.8e12)
    assert floor.seconds == max(floor.arithmetic, floor.bytes)
    assert total_floor(calls(), HARDWARE["P100"]) > total_floor(calls(), HARDWARE["V100"])


@pytest.fixture
def model():
    torch.manual_seed(0)
    glip = Glip(tiny_config()).eval().requires_grad_(False)
    for module in glip.modules():
        if isinstance(module, DyConv):
            module.offset.weight.mul_(20)  # offsets of pixels, not of hundredths
    return glip


@pytest.mark.parametrize("batch", [1, 2])
def test_three_launches_compute_what_thirteen_do(model, batch):
    features = [
        torch.randn(batch, model.config.head.channels, h, w) for h, w in ((13, 21), (7, 11), (4, 6), (2, 3), (1, 2))
    ]
    plain = next(module for module in model.modules() if isinstance(module, DyConv))
    ours = KernelDyConv(copy.deepcopy(plain), convolve_in_torch)
    for a, b in zip(plain(features), ours(features), strict=True):
        assert torch.allclose(a, b, atol=2e-4)


@pytest.fixture
def host_library(monkeypatch, tmp_path):
    """The ctypes layer on the host build of the same arithmetic: fp32, in the CPU's memory."""
    import ctypes

    import kernel
    from glip_engines.compile import build_host_library
    from glip_engines.compilers import find_host_compiler

    try:
        find_host_compiler()
    except GlipError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("GLIP_DEPLOY_CACHE", str(tmp_path))
    host = ctypes.CDLL(str(build_host_library()))
    host.glip_deform_host_problem_error.restype = ctypes.c_char_p
    host.glip_deform_host_packed_weight_bytes.restype = ctypes.c_ulonglong

    class Shim:
        glip_deform_problem_error = staticmethod(host.glip_deform_host_problem_error)
        glip_deform_packed_weight_bytes = staticmethod(host.glip_deform_host_packed_weight_bytes)

        @staticmethod
        def glip_deform_workspace_bytes(problem):
            return 0

        @staticmethod
        def glip_deform_pack_weights(problem, weight, packed, stream):
            pointers = (ctypes.c_void_p(value) for value in (problem, weight, packed))
            host.glip_deform_host_pack_weights(*pointers)
            return 0

        @staticmethod
        def glip_deform_launch(problem, workspace, size, stream):
            return host.glip_deform_host_run(ctypes.c_void_p(problem), 32)

    monkeypatch.setattr(kernel, "_stream", lambda: 0)
    library = object.__new__(kernel.DeformLibrary)
    library._library = Shim
    return library


@pytest.mark.parametrize("batch", [1, 2])
def test_the_model_runs_on_the_c_interface(model, host_library, batch):
    """Packing, strides, flat reads and layouts as the script hands them over."""
    features = [torch.randn(batch, model.config.head.channels, h, w) for h, w in ((13, 21), (7, 11), (4, 6))]
    plain = next(module for module in model.modules() if isinstance(module, DyConv))
    ours = KernelDyConv(copy.deepcopy(plain), with_library(host_library))
    for a, b in zip(plain(features), ours(features), strict=True):
        assert torch.allclose(a, b, atol=2e-4)


def test_the_script_s_own_checks_hold_on_the_host(host_library, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    rows = check_kernels.goldens(torch, host_library)
    assert len(rows) >= 5 and all(row["ok"] for row in rows)
    generator = torch.Generator().manual_seed(0)
    for last in (False, True):
        sizes = [(9, 7), (1, 1), (2, 33)]
        error = check_kernels.against_double(
            torch, host_library, generator, sizes, (24, 40), 2, 2, 3.0, torch.float32, last
        )
        assert error < check_kernels.TOLERANCE["fp32"]


def test_a_problem_refused_says_why(host_library):
    weights = host_library.pack(torch.zeros(4, 4, 3, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="9 levels"):
        maps = (torch.zeros(1, 4, 2, 2), torch.zeros(1, 18, 2, 2), torch.zeros(1, 9, 2, 2))
        host_library.run(weights, [MapLevel(*maps, (2, 2))] * 9)


def test_the_half_precision_model_is_the_model():
    from glip_export.checkpoints import load_checkpoint

    # Trained weights: random ones amplify rounding as no detector does.
    model = load_checkpoint(ROOT / "examples" / "nano" / "glip_nano.pth").model.eval().requires_grad_(False)
    with torch.inference_mode():
        inputs = Inputs.random(model, 96, 160, 9, "cpu")
        image = normalise(inputs.frames, inputs.image_sizes, model.config.input)
        reference = model.predict(image, inputs.embedding, inputs.mask)
        branch = HalfImageBranch(model)
        assert torch.allclose(branch.image(inputs).float(), image, atol=2e-3)
        use_kernel(model, convolve_in_torch)
        assert sum(isinstance(module, KernelDyConv) for module in model.modules()) == model.config.head.blocks
        found = model.predict(branch.image(inputs), inputs.embedding.half(), inputs.mask)
        assert max(relative_error(found, reference).values()) < 0.02
        assert branch(inputs).scores.dtype == torch.float32
        blocks = stages(branch, inputs)
        assert list(blocks) == [
            "normalise",
            "Swin",
            "FPN",
            "fusion",
            "BERT layers of the head",
            "DyConv",
            "decode, top 1000",
        ]
        for action, times in blocks.values():
            assert action() is not None and times in (1, model.config.head.blocks)


def program(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPTS / "check_kernels.py", *arguments], capture_output=True, text=True, check=False
    )


def test_floors_need_no_gpu():
    done = program("--floors")
    assert done.returncode == 0, done.stderr
    assert "P3 100x168, stride 1" in done.stdout and "GLIP-L, all" in done.stdout
    assert all(name in done.stdout for name in HARDWARE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which this is not about")
def test_without_a_gpu_one_line_says_so(tmp_path):
    done = program("--output", str(tmp_path / "x.json"))
    assert done.returncode == 1 and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("check_kernels.py: error: torch ") and done.stderr.count("\n") == 1
    assert "sees no NVIDIA GPU here" in done.stderr


def test_bad_usage():
    assert program().returncode == 2
    done = program("--output", "no/such/folder/x.json")
    assert done.returncode == 1 and "output no/such/folder/x.json" in done.stderr


def test_a_library_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(check_kernels, "require_gpu", lambda: torch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    (tmp_path / "lib.so").write_text("no")
    for name, said in (("none.so", "is not there"), ("lib.so", "cannot be loaded")):
        with pytest.raises(GlipError, match=said):
            check_kernels.check(
                check_kernels.argparse.Namespace(output=tmp_path / "x.json", library=tmp_path / name, runs=1)
            )


def made_up():
    times = {"median": 40.0, "minimum": 39.0, "maximum": 50.0, "p95": 45.0}
    shape = {"name": "P3", "out": [100, 168], "stride": 1, "a_layer": 1, "ours_us": times, "ours_nchw_us": times}
    shape |= {"torchvision_us": {**times, "median": 100.0}, "faster": 2.5}
    shape |= {"floor_us": {"arithmetic": 20.0, "bytes": 4.0}, "times_the_floor": 2.0}
    return {
        "gpu": {"name": "NVIDIA H200"},
        "versions": {"torch": "2.13"},
        "correct": [
            {"case": "golden same", "precision": "fp32", "error": 1e-6, "ok": True},
            {"case": "golden flat", "precision": "fp32", "error": 0.5, "ok": False},
        ],
        "kernels": {"shapes": [shape], "five_levels_in_one_launch_us": times, "torchvision": "0.20"},
        "image_branch": {"left_out": "--kernels-only"},
    }


def test_aims_are_judged_and_said():
    result = made_up()
    result["aims"] = check_kernels.aims(result)
    assert [aim["met"] for aim in result["aims"].values()] == [False, True, None]
    text = check_kernels.as_text(json.loads(json.dumps(result)))
    assert "1 of 2 cases right" in text and "WRONG: golden flat" in text
    assert "P3: times faster than torchvision: 2.50, aim 3, NOT met" in text
    assert "GLIP-T image branch, CUDA graph, ms: not measured, aim 8" in text


def test_times_are_summarised():
    assert check_kernels.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "minimum": 1.0, "maximum": 3.0, "p95": 3.0}


def test_from_start_to_end_without_a_gpu(host_library, monkeypatch, tmp_path, capsys):
    """Every part of it in the order it runs, with CPU stand-ins for what only a GPU has; the times mean nothing."""
    import floors
    import half_model
    import kernel
    from tiny_glip import tiny_model

    def clocked(torch, action, runs):
        action()
        return check_kernels.summary([1.0] * runs)

    def at_once(torch, action):
        return action(), action

    graph = {"case": "in a CUDA graph", "precision": "fp32", "error": 0.0, "ok": True}
    for target, name, stand_in in (
        (check_kernels, "require_gpu", lambda: torch),
        (check_kernels, "timed", clocked),
        (check_kernels, "milliseconds", clocked),
        (check_kernels, "captured", at_once),
        (check_kernels, "find_torchvision", lambda: None),
        (check_kernels, "in_a_graph", lambda *_: graph),
        (check_kernels, "precisions", lambda torch: {"fp32": torch.float32}),
        (check_kernels, "stand_in", lambda torch, deform=None: tiny_model()),
        (kernel, "DeformLibrary", lambda file: host_library),
        (floors, "calls", lambda: calls(96, 160)),
        (half_model.Inputs, "random", lambda glip, *_: random_inputs(glip, 96, 160, 16, "cpu")),
        (torch.cuda, "get_device_capability", lambda: (9, 0)),
        (torch.cuda, "get_device_name", lambda: "NVIDIA H200"),
        (torch.cuda, "max_memory_allocated", lambda: 0),
        (torch.Tensor, "cuda", lambda self: self),
        (torch.Tensor, "half", lambda self: self),
        (torch.nn.Module, "cuda", lambda self: self),
        (torch.nn.Module, "half", lambda self: self),
    ):
        monkeypatch.setattr(target, name, stand_in)
    monkeypatch.setattr(
        check_kernels, "CASES", [([(9, 7), (1, 1)], 24, 40, 2, 1, 3.0), ([(9, 7), (3, 64)], 16, 8, 2, 2, 3.0)]
    )
    (tmp_path / "lib.so").write_text("")
    file = tmp_path / "result.json"
    assert check_kernels.main(["--output", str(file), "--library", str(tmp_path / "lib.so"), "--runs", "5"]) == 0
    result = json.loads(file.read_text())
    assert all(row["ok"] for row in result["correct"]) and len(result["kernels"]["shapes"]) == 9
    assert result["kernels"]["shapes"][0]["times_the_floor"] > 0
    assert max(result["image_branch"]["error_against_fp32"].values()) < 1e-3  # nothing is halved here
    assert result["aims"]["P3: times faster than torchvision"]["met"] is None
    said = capsys.readouterr().out
    assert "GLIP-T image branch" in said and "DyConv" in said and "not measured" in said


random_inputs = Inputs.random
