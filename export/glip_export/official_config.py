"""Official GLIP YAML files: what they add to a checkpoint's shapes, and what is not supported."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from glip_deploy.errors import OptionError, shown
from glip_deploy.files import unreadable
from glip_export.model.config import GlipConfig

__all__ = ["apply_official_config"]

Number = TypeVar("Number", int, float)

# (path in the YAML, the only value the model implements)
REQUIRED = (
    ("MODEL.RPN_ARCHITECTURE", "VLDYHEAD"),
    ("MODEL.SWINT.APE", False),
    ("MODEL.SWINT.VERSION", "v1"),
    ("MODEL.SWINT.LAYER_SCALE", 0),
    ("MODEL.LANGUAGE_BACKBONE.N_LAYERS", 1),
    ("MODEL.LANGUAGE_BACKBONE.MASK_SPECIAL", False),
    ("MODEL.GROUP_NORM.NUM_GROUPS", 16),
    ("MODEL.DYHEAD.USE_DFCONV", True),
    ("MODEL.DYHEAD.USE_DYFUSE", True),
    ("MODEL.DYHEAD.USE_DYRELU", True),
    ("MODEL.DYHEAD.USE_GN", True),
    ("MODEL.DYHEAD.SCORE_AGG", "MEAN"),
    ("MODEL.DYHEAD.FUSE_CONFIG.STABLE_SOFTMAX_2D", False),
    ("MODEL.DYHEAD.FUSE_CONFIG.SEPARATE_BIDIRECTIONAL", False),
    ("MODEL.DYHEAD.FUSE_CONFIG.USE_DOT_PRODUCT_TOKEN_LOSS", True),
    ("MODEL.RPN.ASPECT_RATIOS", [1.0]),
    ("MODEL.RPN.ANCHOR_STRIDE", [8, 16, 32, 64, 128]),
    ("MODEL.RPN.ANCHOR_SIZES", [64, 128, 256, 512, 1024]),
    ("MODEL.RPN.SCALES_PER_OCTAVE", 1),
    ("INPUT.TO_BGR255", True),
    ("DATALOADER.SIZE_DIVISIBILITY", 32),
)


def apply_official_config(config: GlipConfig, path: Path) -> GlipConfig:
    """Check a derived configuration against an official YAML and take its thresholds and input sizes.

    Settings absent from the file keep the released defaults.

    Raises:
        OptionError: unreadable file, a setting that is not supported, or one that contradicts the checkpoint.
    """
    import yaml

    problem = unreadable(path)
    if problem is not None:
        raise OptionError(f"config {path} {problem}; give an official GLIP YAML or leave --config out")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a plain ValueError
        raise OptionError(f"config {path} is not YAML: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise OptionError(f"config {path} cannot be read ({error.strerror or error})") from None
    if not isinstance(content, dict):
        raise OptionError(f"config {path} is not a GLIP configuration: expected sections such as MODEL and INPUT")

    def value(name: str, default: Any) -> Any:
        node: Any = content
        for part in name.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return _plain(node)

    for name, supported in REQUIRED:
        found = value(name, supported)
        if found != supported and list(_sequence(found)) != list(_sequence(supported)):
            raise OptionError(f"config {path}: {name} = {shown(found)} is not supported, only {supported!r}")
    derived = {
        "MODEL.SWINT.EMBED_DIM": config.swin.embed_dim,
        "MODEL.SWINT.DEPTHS": list(config.swin.depths),
        "MODEL.SWINT.NUM_HEADS": list(config.swin.num_heads),
        "MODEL.SWINT.WINDOW_SIZE": config.swin.window,
        "MODEL.DYHEAD.NUM_CONVS": config.head.blocks,
        "MODEL.DYHEAD.CHANNELS": config.head.channels,
        "MODEL.DYHEAD.FUSE_CONFIG.EARLY_FUSE_ON": config.head.fusion,
        "MODEL.LANGUAGE_BACKBONE.LANG_DIM": config.bert.hidden,
    }
    for name, expected in derived.items():
        found = value(name, expected)
        if found != expected and list(_sequence(found)) != list(_sequence(expected)):
            raise OptionError(
                f"config {path}: {name} = {shown(found)}, but the checkpoint has {expected!r} ({config.variant}); "
                "leave --config out to use the checkpoint's own"
            )

    def number(name: str, default: Number, least: int, most: float = math.inf) -> Number:
        found = value(name, default)
        try:
            converted = math.nan if isinstance(found, bool) else float(found)
        except (TypeError, ValueError, OverflowError):
            converted = math.nan
        whole = isinstance(default, int)
        if not math.isfinite(converted) or (whole and converted != int(converted)):
            kind = "a whole number" if whole else "a number"
            raise OptionError(f"config {path}: {name} = {shown(found)} is not {kind}; released files have {default}")
        if not least <= converted <= most:
            legal = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise OptionError(f"config {path}: {name} = {shown(found)} is out of range; legal is {legal}")
        return type(default)(converted)

    def channels(name: str, default: tuple[float, float, float], positive: bool) -> tuple[float, float, float]:
        found = value(name, default)
        try:
            blue, green, red = (float(v) for v in found)
        except (TypeError, ValueError, OverflowError):
            raise OptionError(
                f"config {path}: {name} = {shown(found)} is not three numbers; released files have {default}"
            ) from None
        if not all(math.isfinite(v) and (v > 0 or not positive) for v in (blue, green, red)):
            legal = "finite numbers above 0" if positive else "finite numbers"
            raise OptionError(f"config {path}: {name} = {shown(found)} is out of range; legal are {legal}")
        return blue, green, red

    head, source = config.head, config.input
    head = replace(
        head,
        score_threshold=number("MODEL.ATSS.INFERENCE_TH", head.score_threshold, 0, 1),
        candidates_per_level=number("MODEL.ATSS.PRE_NMS_TOP_N", head.candidates_per_level, 1),
        nms_iou=number("MODEL.ATSS.NMS_TH", head.nms_iou, 0, 1),
        max_detections=number("MODEL.ATSS.DETECTIONS_PER_IMG", head.max_detections, 1),
    )
    inputs = replace(
        source,
        pixel_mean=channels("INPUT.PIXEL_MEAN", source.pixel_mean, positive=False),
        pixel_std=channels("INPUT.PIXEL_STD", source.pixel_std, positive=True),
        shortest_side=number("INPUT.MIN_SIZE_TEST", source.shortest_side, 1),
        longest_side=number("INPUT.MAX_SIZE_TEST", source.longest_side, 1),
        max_tokens=number("MODEL.LANGUAGE_BACKBONE.MAX_QUERY_LEN", source.max_tokens, 3, config.longest_text),
    )
    return replace(config, head=head, input=inputs)


def _plain(value: Any) -> Any:
    """Return a value with tuples, which official files write as strings such as "(2, 2, 6, 2)", made lists."""
    if isinstance(value, str) and value.startswith("(") and value.endswith(")"):
        import ast

        try:
            literal = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return value
        return list(literal) if isinstance(literal, tuple) else literal
    return value


def _sequence(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
