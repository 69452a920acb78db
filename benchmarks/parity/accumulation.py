"""What sums in fp16 would cost: every matrix product and convolution of GLIP-T on samples of its own numbers.

    python benchmarks/parity/accumulation.py            GLIP-T, stand-in weights, 800x1344, about a minute on idle cores

A strongly typed network says that a product has fp16 factors and an fp16 result, not how it is summed in between. This
runs the model in torch, rounds the factors of every product to fp16 and sums some of its results again: in fp32; in
fp16 after every sixteen terms, as tensor cores with fp16 accumulators do; and in fp16 after every term. The figure is
the root mean square of the error over that of the exact results, the rounding of the result to fp16 included.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from glip_export.model.glip import Glip
    from numpy.typing import NDArray

SAMPLES = 32
"""Results of each product that are looked at."""
STEP = 16
"""Terms that a tensor core adds before it rounds to its accumulator."""
WAYS = ("fp32", "fp16 in steps", "fp16 one by one")


def rounded_sums(left: NDArray[Any], right: NDArray[Any]) -> dict[str, float]:
    """Return the relative error of S sums of K products, (S, K) each, by the way they are summed."""
    a, b = left.astype(np.float16).astype(np.float64), right.astype(np.float16).astype(np.float64)
    terms = a * b  # exact: 22 bits
    exact = terms.sum(axis=1)
    with np.errstate(over="ignore"):  # infinity, as on a GPU
        found = {"fp32": exact.astype(np.float32).astype(np.float16)}
        for way, step in zip(WAYS[1:], (STEP, 1), strict=True):
            total = np.zeros(len(terms), np.float16)
            for start in range(0, terms.shape[1], step):
                total = (total + terms[:, start : start + step].sum(axis=1)).astype(np.float16)
            found[way] = total
    scale = float(np.sqrt(np.square(exact).mean())) or 1.0
    return {way: float(np.sqrt(np.square(sums - exact).mean())) / scale for way, sums in found.items()}


@dataclass
class Row:
    """The products of one kind in one part of the model."""

    terms: int
    count: int = 0
    errors: list[dict[str, float]] = field(default_factory=list)

    def worst(self, way: str) -> float:
        """Return the largest error of its products."""
        return max(errors[way] for errors in self.errors)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, which has no types
    """Samples every product that torch computes while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: dict[tuple[str, int], Row] = {}
        self.part = "other"
        self._generator = np.random.default_rng(0)
        self._taps: list[tuple[NDArray[Any], NDArray[Any]]] | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`."""
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self._product(args[0], args[1])
        elif name == "addmm":
            self._product(args[1], args[2])
        elif name == "convolution":
            self._convolution(args[0], args[1], args[3], args[4], result.shape)
        return result

    def deform(self, convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap a deformable convolution, whose nine products are one in an engine."""

        def watched(*args: Any) -> Tensor:
            self._taps = []
            result = convolve(*args)
            taps, self._taps = self._taps, None
            assert taps is not None
            left, right = (np.concatenate(side, axis=1) for side in zip(*taps, strict=True))
            self._note(left, right, "deformable convolution")
            return result

        return watched

    def _note(self, left: NDArray[Any], right: NDArray[Any], part: str | None = None) -> None:
        if self._taps is not None:
            self._taps.append((left, right))
            return
        key = (part or self.part, left.shape[1])
        row = self.rows.setdefault(key, Row(left.shape[1]))
        row.count += 1
        row.errors.append(rounded_sums(left, right))

    def _pick(self, *sizes: int) -> list[NDArray[np.int64]]:
        generator = np.random.default_rng(0) if self._taps is not None else self._generator  # the same for all taps
        return [generator.integers(0, size, SAMPLES) for size in sizes]

    def _product(self, left: Tensor, right: Tensor) -> None:
        if left.dim() == 2:
            left, right = left[None], right[None]
        batch, i, j = self._pick(left.shape[0], left.shape[1], right.shape[2])
        self._note(left[batch, i].numpy(), right[batch, :, j].numpy())

    def _convolution(self, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], out: torch.Size) -> None:
        height, width = weight.shape[2:]
        rows = []
        chosen = self._pick(*out)
        for b, _, y, column in zip(*chosen, strict=True):
            patch = torch.zeros(x.shape[1], height, width)
            for dy in range(height):
                for dx in range(width):
                    v, h = int(y) * stride[0] - padding[0] + dy, int(column) * stride[1] - padding[1] + dx
                    if 0 <= v < x.shape[2] and 0 <= h < x.shape[3]:
                        patch[:, dy, dx] = x[int(b), :, v, h]
            rows.append(patch.flatten())
        self._note(torch.stack(rows).numpy(), weight[chosen[1]].flatten(1).numpy())


def watch(model: Glip, watcher: Watch, run: Callable[[], Any]) -> dict[tuple[str, int], Row]:
    """Run a model and return what its products lose, by part and number of terms."""
    from glip_export.model.bert import BertLayer
    from glip_export.model.dyhead import DyConv
    from glip_export.model.fpn import Fpn
    from glip_export.model.fusion import VlFuse
    from glip_export.model.swin import Swin

    parts = {Swin: "Swin", Fpn: "FPN", VlFuse: "fusion", BertLayer: "text layers of the head", DyConv: "dynamic head"}
    handles = []

    def enter(part: str) -> Callable[..., None]:
        return lambda *_: setattr(watcher, "part", part)

    def leave(*_: Any) -> None:
        watcher.part = "predictions"

    for module in model.modules():
        part = parts.get(type(module))
        if part is not None:
            handles += [module.register_forward_pre_hook(enter(part)), module.register_forward_hook(leave)]
    try:
        with torch.no_grad(), watcher:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return watcher.rows


def as_markdown(rows: dict[tuple[str, int], Row]) -> str:
    """Return one line for each part and number of terms: its worst product."""
    lines = ["| part | terms | products | " + " | ".join(WAYS) + " |", "|---|---|---|---|---|---|"]
    for (part, terms), row in sorted(rows.items()):
        cells = " | ".join(f"{row.worst(way):.1e}" for way in WAYS)
        lines.append(f"| {part} | {terms} | {row.count} | {cells} |")
    return "\n".join(lines)


def grouped(rows: dict[tuple[str, int], Row]) -> dict[tuple[str, int], Row]:
    """Put products of a part that have nearly the same number of terms together: those of the next power of four."""
    groups: dict[tuple[str, int], Row] = defaultdict(lambda: Row(0))
    for (part, terms), row in rows.items():
        key = (part, 4 ** int(np.ceil(np.log(terms) / np.log(4) - 1e-9)))
        group = groups[key]
        group.terms, group.count = max(group.terms, terms), group.count + row.count
        group.errors += row.errors
    return {(part, group.terms): group for (part, _), group in groups.items()}


def main() -> None:
    """Run the program."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from glip_export.checkpoints import build, derive_config
    from glip_export.model.deform import deform_conv2d
    from glip_export.model.glip import ImageBranch
    from island_evidence import feed_at_full_size
    from parity_data import stand_in_state

    feed = feed_at_full_size()
    watcher = Watch()
    state = stand_in_state("glip_T")
    model = build(state, derive_config(state), deform=watcher.deform(deform_conv2d))[0].eval()
    inputs = [torch.from_numpy(np.ascontiguousarray(array)) for array in feed.values()]
    print(as_markdown(grouped(watch(model, watcher, lambda: ImageBranch(model)(*inputs)))))


if __name__ == "__main__":
    main()
