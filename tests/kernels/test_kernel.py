"""A DyConv on the kernels' C interface, and the half-precision model, compute what the model computes."""

import copy
from pathlib import Path

import pytest
import torch
from glip_export.model.dyhead import DyConv
from glip_export.model.fpn import level_sizes
from glip_export.model.glip import Glip
from kernels.half_model import HalfImageBranch, Inputs, network_input, relative_error, stages
from kernels.kernel import KernelDyConv, MapLevel, convolve_in_torch, use_kernel, with_library
from tiny_glip import tiny_config

ROOT = Path(__file__).resolve().parents[2]


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
    sizes = level_sizes(features)
    plain = next(module for module in model.modules() if isinstance(module, DyConv))
    ours = KernelDyConv(copy.deepcopy(plain), convolve_in_torch)
    for a, b in zip(plain(features, sizes), ours(features, sizes), strict=True):
        assert torch.allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_model_runs_on_the_c_interface(model, host_library, batch):
    """Packing, strides, flat reads and layouts as the script hands them over."""
    features = [torch.randn(batch, model.config.head.channels, h, w) for h, w in ((13, 21), (7, 11), (4, 6))]
    sizes = level_sizes(features)
    plain = next(module for module in model.modules() if isinstance(module, DyConv))
    ours = KernelDyConv(copy.deepcopy(plain), with_library(host_library))
    for a, b in zip(plain(features, sizes), ours(features, sizes), strict=True):
        assert torch.allclose(a, b, atol=2e-4)


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
        image = network_input(model, inputs)
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
            "normalize",
            "Swin",
            "FPN",
            "fusion",
            "BERT layers of the head",
            "DyConv",
            "decode, top 1000",
        ]
        for action, times in blocks.values():
            assert action() is not None and times in (1, model.config.head.blocks)
