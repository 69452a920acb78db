"""How fast the kernels are: every shape of GLIP alone, and GLIP-T's image branch in fp16 torch with them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from glip_bench.limits.hardware import hardware_of
from glip_export.checkpoints import build, derive_config
from glip_export.model.deform import DeformConv
from glip_export.model.glip import Glip

from glip_deploy.errors import OptionError
from kernels.correctness import random_levels
from kernels.floors import LAYERS, calls, floor_of, total_floor
from kernels.half_model import HalfImageBranch, Inputs, network_input, relative_error, stages
from kernels.kernel import DeformLibrary, MapLevel, Weights, use_kernel, with_library
from kernels.timing import captured, milliseconds, timed

__all__ = ["image_branch", "kernel_times"]

STAND_IN = Path(__file__).resolve().parents[2] / "examples" / "stand_in"


def kernel_times(library: DeformLibrary, gpu: str, runs: int) -> dict[str, Any]:
    """Time every shape of GLIP at 800x1344 in fp16, each call alone, and one layer's own five levels in one launch."""
    machine = no_floor = None
    try:
        machine = hardware_of(gpu)
    except OptionError as error:
        no_floor = str(error)
    torchvision = find_torchvision()
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(256, 256, 3, 3, generator=generator) / 48).cuda().half()
    bias = torch.zeros(256).cuda().half()
    rows = []
    layer = {"ours": 0.0, "torchvision": 0.0}
    for call in calls():
        (level,) = random_levels(generator, [call.size], 256, 1, call.stride, 1.0)
        plain = replace(level, x=level.x.half())
        nhwc = replace(level, x=plain.x.contiguous(memory_format=torch.channels_last))
        weights = library.pack(weight, bias, call.stride)
        row: dict[str, Any] = {"name": call.name, "out": list(call.out), "stride": call.stride, "a_layer": call.times}
        row["ours_us"] = timed(_launch(library, weights, nhwc, channels_last=True), runs)
        row["ours_nchw_us"] = timed(_launch(library, weights, plain, channels_last=False), runs)
        layer["ours"] += call.times * row["ours_us"]["median"]
        if torchvision is not None:
            offset, mask = level.offset.half(), level.mask.half()
            theirs = partial(deform_by(torchvision), plain.x, offset, mask, weight, bias, call.stride)
            row["torchvision_us"] = timed(theirs, runs)
            row["faster"] = row["torchvision_us"]["median"] / row["ours_us"]["median"]
            layer["torchvision"] += call.times * row["torchvision_us"]["median"]
        if machine is not None:
            floor = floor_of(call, machine)
            row["floor_us"] = {"arithmetic": floor.arithmetic * 1e6, "bytes": floor.bytes * 1e6}
            row["times_the_floor"] = row["ours_us"]["median"] / (floor.seconds * 1e6)
        rows.append(row)
    levels = random_levels(generator, [call.size for call in calls() if call.stride == 1], 256, 1, 1, 1.0)
    halves = [replace(v, x=v.x.half().contiguous(memory_format=torch.channels_last)) for v in levels]
    weights = library.pack(weight, bias)
    together = timed(library.bind(weights, halves, library.run(weights, halves, channels_last=True)), runs)
    floors = machine and {name: n * total_floor(calls(), machine) * 1e3 for name, n in LAYERS.items()}
    return {
        "shapes": rows,
        "five_levels_in_one_launch_us": together,
        "one_layer_us": {name: value for name, value in layer.items() if value},
        "floor_of_a_model_ms": floors,
        "no_floor": no_floor,
        "torchvision": "not installed: not compared" if torchvision is None else str(torchvision.__version__),
    }


def _launch(library: DeformLibrary, weights: Weights, level: MapLevel, *, channels_last: bool) -> Callable[[], None]:
    """Return one prepared launch."""
    return library.bind(weights, [level], library.run(weights, [level], channels_last))


def find_torchvision() -> Any:
    """Return torchvision if it has its CUDA operators, else None."""
    try:
        import_module("torchvision.ops")
    except (ImportError, RuntimeError):
        return None
    return import_module("torchvision")


def deform_by(torchvision: Any) -> DeformConv:
    """Return torchvision's deformable convolution, for `glip_export.model`."""

    def convolve(
        x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int
    ) -> torch.Tensor:
        run = torchvision.ops.deform_conv2d
        result: torch.Tensor = run(
            x, offset.contiguous(), weight, bias, stride=stride, padding=1, mask=mask.contiguous()
        )
        return result

    return convolve


def image_branch(library: DeformLibrary, runs: int) -> dict[str, Any]:
    """Time GLIP-T's image branch at 800x1344 with 16 tokens in fp16, and compare its outputs with those of fp32."""
    glip = stand_in().cuda()
    with torch.inference_mode():
        inputs = Inputs.random(glip, 800, 1344, 16, "cuda")
        reference = glip.predict(network_input(glip, inputs), inputs.embedding, inputs.mask)
        result: dict[str, Any] = {"canvas": [800, 1344], "tokens": 16, "classes": 5, "precision": "fp16"}
        torchvision = find_torchvision()
        if torchvision is not None:
            theirs = HalfImageBranch(stand_in(deform_by(torchvision)).cuda())
            result["eager_torchvision_ms"] = milliseconds(lambda: theirs(inputs), max(5, runs // 5))
            del theirs
        branch = HalfImageBranch(glip)
        use_kernel(glip, with_library(library))
        found = glip.predict(branch.image(inputs), inputs.embedding.half(), inputs.mask)
        result["error_against_fp32"] = relative_error(found, reference)
        result["eager_ms"] = milliseconds(lambda: branch(inputs), max(5, runs // 5))
        _, replay = captured(lambda: branch(inputs))
        result["graph_ms"] = milliseconds(replay, runs)
        result["stages_ms"] = {}
        for name, (action, times) in stages(branch, inputs).items():
            _, replay = captured(action)
            one = milliseconds(replay, runs)["median"]
            result["stages_ms"][name] = {"one": one, "times": times, "all": one * times}
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def stand_in(deform: DeformConv | None = None) -> Glip:
    """Return a full-size GLIP-T with the stand-in weights; `deform` computes its deformable convolutions."""
    sys.path.insert(0, str(STAND_IN.parent))
    weights: Any = import_module("stand_in.synth_weights")
    state = {
        key: torch.from_numpy(value) for key, value in weights.items(str(STAND_IN / "manifests" / "glip_T.json"), "")
    }
    return build(state, derive_config(state), deform=deform)[0].eval().requires_grad_(False)
