"""What will be built: options checked against a bundle, with every default filled in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.bundle.contract import PARTS
from glip_deploy.errors import OptionError
from glip_deploy.frames.geometry import SIZE_DIVISOR, ceil_to
from glip_engines.flavours import Flavour
from glip_engines.options import BUCKETS, FORMS, PRECISIONS, Range

if TYPE_CHECKING:
    from glip_deploy.bundle.contract import TensorContract
    from glip_deploy.bundle.manifest import Bundle
    from glip_engines.options import BuildOptions

__all__ = ["GRAPHS", "Plan", "Profile"]

GRAPHS = ("text", "image")

Profile = Mapping[str, tuple[tuple[int, ...], ...]]
"""Of an optimization profile: smallest, best and largest shape by input."""


@dataclass(frozen=True)
class Plan:
    """Options with every default filled in, checked against the bundle."""

    bundle: Bundle
    options: BuildOptions
    precision: str
    form: str
    plugin: Path | None
    height: Range
    width: Range
    tokens: tuple[Range, ...]
    classes: Range

    @classmethod
    def of(cls, bundle: Bundle, options: BuildOptions, flavour: Flavour) -> Plan:
        """Fill in and check options.

        Raises:
            OptionError: the first option that cannot be used, with what can.
        """
        plugin = None if options.plugin is None else options.plugin.resolve()
        form = options.form or ("native" if plugin is None else "plugin")
        if form not in FORMS:
            raise OptionError(f'form is "{form}"; legal is {" or ".join(FORMS)}')
        if form == "native" and plugin is not None:
            raise OptionError("--form native uses no plugin; leave out --plugin, or use --form plugin")
        if plugin is not None and not plugin.is_file():
            raise OptionError(f"--plugin {options.plugin} is not a file; leave it out and --form plugin compiles one")
        if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
            raise OptionError(f"--optimization-level is {options.optimization_level}; legal is 0 to 5")
        if options.workspace is not None and options.workspace < 1:
            raise OptionError(f"--workspace is {options.workspace} bytes; leave it out for no limit")
        if options.name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", options.name):
            raise OptionError(
                f'--name is "{options.name}"; legal are letters, digits, ".", "-" and "_", no leading dot'
            )
        if options.timing_cache is not None and flavour is Flavour.RTX:
            raise OptionError(
                "tensorrt-rtx keeps no timing cache (it times nothing while building); leave out --timing-cache"
            )
        sides = bundle.manifest.config.input
        longest, shortest = (ceil_to(side, SIZE_DIVISOR) for side in (sides.longest_side, sides.shortest_side))
        height = options.height or Range(SIZE_DIVISOR, min(shortest, longest), longest)
        width = options.width or Range(SIZE_DIVISOR, longest, longest)
        for name, axis in (("height", height), ("width", width)):
            if not axis.least <= axis.best <= axis.most:
                raise OptionError(
                    f"{name} is {axis.least} at least, {axis.best} at best, {axis.most} at most; put them in order"
                )
        tokens = options.tokens or (Range(1, min(BUCKETS[0], bundle.max_tokens), bundle.max_tokens),)
        for bucket in tokens:
            if bucket.most > bundle.max_tokens:
                raise OptionError(
                    f"--tokens is {bucket}; this bundle's prompts have {bundle.max_tokens} tokens at most"
                )
        if options.split and not bundle.is_split:
            raise OptionError(
                f"bundle {bundle.path} has no backbone.onnx and head.onnx for --split;"
                " export it again with glip-export, or leave --split out"
            )
        precision = _precision(bundle, options.precision)
        classes = options.classes or Range(1, 8, 128)
        return cls(bundle, options, precision, form, plugin, height, width, tokens, classes)

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that are built, in order."""
        return (*GRAPHS, *PARTS) if self.options.split else GRAPHS

    @property
    def lowering(self) -> str:
        """What the bundle's graphs have to be lowered to; "fp32" if they are in their precision already."""
        return "fp32" if self.precision == self.bundle.manifest.precision else self.precision

    def command_options(self) -> str:
        """Return what to type after `glip-build BUNDLE` for the same engines; flavour and target are the machine's."""
        size = ["--size", f"{self.height.best}x{self.width.best}"]
        if not (self.height.is_fixed and self.width.is_fixed):
            size = []
            for option, name in (("--min", "least"), ("--opt", "best"), ("--max", "most")):
                size += [option, f"{getattr(self.height, name)}x{getattr(self.width, name)}"]
        words = ["--precision", self.precision, "--form", self.form, *size]
        words += ["--tokens", ",".join(str(bucket) for bucket in self.tokens)]
        words += ["--classes", str(self.classes), "--batch", str(self.options.batch)]
        words += ["--split"] if self.options.split else []
        for option, value in (
            ("--plugin", self.plugin),
            ("--workspace", None if self.options.workspace is None else f"{self.options.workspace}B"),
            ("--timing-cache", self.options.timing_cache),
            ("--optimization-level", self.options.optimization_level),
            ("--name", self.options.name),
        ):
            if value is not None:
                words += [option, str(value)]
        return shlex.join(words)

    def profiles(self, graph: str) -> tuple[Profile, ...]:
        """Return the optimization profiles of one of `graphs`."""

        def shapes(tensor: TensorContract, ranges: Mapping[str, Range]) -> tuple[tuple[int, ...], ...]:
            return tuple(
                tuple(side if isinstance(side, int) else getattr(ranges[side], which) for side in tensor.shape)
                for which in ("least", "best", "most")
            )

        inputs = self.bundle.manifest.io[graph].inputs
        return tuple({tensor.name: shapes(tensor, ranges) for tensor in inputs} for ranges in self._axes(graph))

    def pinned(self, graph: str) -> dict[str, int]:
        """Return the named axes of a graph that have one size in all profiles, with that size."""
        first, *rest = self._axes(graph)
        return {
            axis: ranges.least
            for axis, ranges in first.items()
            if ranges.is_fixed and all(other[axis] == ranges for other in rest)
        }

    def _axes(self, graph: str) -> list[dict[str, Range]]:
        """Return the ranges of the named axes, one dictionary for each optimization profile."""
        if graph == "text":  # prompts are encoded one at a time, whatever the batch of pictures
            fixed = {"batch": Range.fixed(1)}
        else:
            fixed = {"batch": self.options.batch, "height": self.height, "width": self.width, "classes": self.classes}
            for stride in self.bundle.manifest.config.head.strides:
                fixed[f"height_{stride}"], fixed[f"width_{stride}"] = self.height // stride, self.width // stride
        if graph == "backbone":  # which sees no prompt
            return [fixed]
        return [{**fixed, "tokens": bucket} for bucket in self.tokens]


def _precision(bundle: Bundle, wanted: str | None) -> str:
    own = bundle.manifest.precision
    if wanted is not None and wanted not in PRECISIONS:
        raise OptionError(f'precision is "{wanted}"; legal is {", ".join(PRECISIONS)}')
    if own == "fp32":
        return wanted or "fp16"
    if wanted not in (None, own):
        raise OptionError(
            f"bundle {bundle.path} was exported in {own} and cannot be built in {wanted};"
            f" leave out --precision, or export again with --precision fp32"
        )
    return own
