"""GLIP checkpoints: read safely, recognize form and variant from the keys, build the model.

A released file is `{"model": state_dict}`, possibly with a `module.` prefix on every key, buffers the model can
rebuild, and training heads it never uses; `checkpoint_forms` knows the other forms. Weights are read with
`weights_only=True`: a `.pth` is a pickle, and a pickle from the internet is a program.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.errors import CheckpointError
from glip_deploy.files import sha256_of, unreadable
from glip_export.checkpoint_forms import irregularity, to_official, unsupported_family
from glip_export.model.config import BertConfig, GlipConfig, HeadConfig, InputConfig, SwinConfig
from glip_export.official_config import apply_official_config
from glip_export.tokenizer import SPECIAL_TOKENS

if TYPE_CHECKING:
    import torch

    from glip_export.model.deform import DeformConv
    from glip_export.model.glip import Glip

    StateDict = Mapping[str, torch.Tensor]

__all__ = [
    "Checkpoint",
    "CheckpointFile",
    "build",
    "derive_config",
    "load_checkpoint",
    "read_checkpoint",
]

# Rebuilt from the configuration, or used in training only. Everything ignored is listed to the user all the same.
EXPECTED_EXTRAS = re.compile(
    r"relative_position_index$|position_ids$|cell_anchors\.\d+$|\.cls_logits\.|\.pooler\.|\.attn_mask$"
    r"|num_batches_tracked$|resizer|mlm_head|contrastive|\.tunable_linear\.bias$|^roi_heads\."
)
# An unknown key here would change the result, so it must not be passed over.
INFERENCE_PATH = re.compile(
    r"^(backbone\.|neck\.|rpn\.head\.(dyhead_tower|bbox_pred|centerness|scales|dot_product)"
    r"|language_backbone\.body\.model\.(embeddings|encoder))"
)
MARKERS = ("backbone.body.patch_embed.proj.weight", "rpn.head.bbox_pred.weight", "rpn.head.log_scale")
SUPPORTED = "supported are GLIP-T (A), (B), (C), GLIP-T, GLIP-L, DesCo-GLIP and models of the same architecture"
LARGEST_WINDOW = 32
"""Of Swin, in tokens: the index of relative positions, which is rebuilt, has the fourth power of it as entries."""
BERT = "language_backbone.body.model."
TOWER = "rpn.head.dyhead_tower."


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to run, and the file it is from."""

    model: Glip
    config: GlipConfig
    sha256: str
    ignored: tuple[str, ...]
    """Keys of the file that inference does not use."""
    vocabulary: tuple[str, ...] | None = None
    """WordPiece entries in order of their ids, None for BERT-base's own."""


@dataclass(frozen=True)
class CheckpointFile:
    """What a `.pth` holds, nothing executed: `{"model": ..., "glip_config": ..., "vocabulary": ...}`.

    In place of "model" there may be "state_dict", or nothing else than the tensors, as in mmdetection's files.
    """

    state: StateDict
    """Tensors by official key, without the `module.` prefix, whatever the form of the file."""
    facts: Mapping[str, Any]
    """`glip_config`, which released files do not have: what shapes cannot tell, `{"bert_heads": 12}`."""
    vocabulary: tuple[str, ...] | None
    """`vocabulary`, which released files do not have: the WordPiece entries, where they are not BERT-base's."""


def load_checkpoint(path: Path, config_file: Path | None = None, *, deform: DeformConv | None = None) -> Checkpoint:
    """Read a checkpoint and build its model (fp32, evaluation mode).

    Args:
        path: a `.pth` as released, in the official form or in mmdetection's.
        config_file: an official YAML; it is checked against the file, and gives what shapes cannot tell.
        deform: computes the deformable convolutions; by default `glip_export.model.deform.deform_conv2d`.

    Raises:
        CheckpointError: missing, truncated, not a GLIP, holding code, holding NaN, or of unexpected shapes.
    """
    file = read_checkpoint(path)
    config = derive_config(file.state, file.facts, path)
    if config_file is not None:
        config = apply_official_config(config, config_file)
    if file.vocabulary is not None and len(file.vocabulary) != config.bert.vocabulary:
        raise CheckpointError(
            f"checkpoint {path}: vocabulary has {len(file.vocabulary)} entries, the word embeddings have "
            f"{config.bert.vocabulary} rows; they must be equal"
        )
    model, ignored = build(file.state, config, path, deform)
    return Checkpoint(model, config, sha256_of(path), ignored, file.vocabulary)


def read_checkpoint(path: Path) -> CheckpointFile:
    """Read a checkpoint without executing anything from it.

    Raises:
        CheckpointError: missing, empty, truncated, corrupt, holding code or objects, not `{"model": state_dict}`, or
            with two names of the same tensor.
    """
    import pickle

    import torch

    problem = unreadable(path)
    if problem is not None:
        raise CheckpointError(f"checkpoint {path} {problem}; give the path of a GLIP .pth file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes); download it again")
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # saved before torch 1.6
    except pickle.UnpicklingError as error:
        if "weights" in str(error).lower() and ("GLOBAL" in str(error) or "global" in str(error)):
            found = re.search(r"(?:GLOBAL|global):?\s+(?:GLOBAL\s+)?([\w]+(?:\.\w+)+)", str(error))
            name = found.group(1) if found else "an object"
            if name.startswith("mmengine."):
                raise CheckpointError(
                    f"checkpoint {path} holds the state of a training besides weights ({name}); refused, nothing was"
                    " executed: strip it with mmdetection's tools/model_converters/publish_model.py, which keeps"
                    ' "meta" and "state_dict", and export the file that it writes'
                ) from None
            raise CheckpointError(
                f"checkpoint {path} holds code or objects ({name}), not only weights; refused, nothing was executed: "
                'save {"model": model.state_dict()} again from a source you trust'
            ) from None
        raise CheckpointError(
            f"checkpoint {path} is not a PyTorch checkpoint or is corrupt; download it again"
        ) from None
    except Exception as error:  # a damaged file makes the reader fail anywhere
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint {path} cannot be read: truncated or corrupt ({reason[:120]}); download it again"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f'checkpoint {path} holds a {type(content).__name__}, expected {{"model": state_dict}}')
    facts = content.get("glip_config", {})
    entry = next((name for name in ("model", "state_dict") if name in content), None)
    state = content if entry is None else content[entry]
    if not isinstance(state, Mapping):
        raise CheckpointError(f'checkpoint {path}: "{entry}" is a {type(state).__name__}, expected a state dict')
    tensors = {
        str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)
    }
    if not isinstance(facts, Mapping):
        raise CheckpointError(
            f'checkpoint {path}: "glip_config" is a {type(facts).__name__}, expected {{"bert_heads": 12}}'
        )
    vocabulary = _vocabulary(content.get("vocabulary"), path)
    try:
        return CheckpointFile(to_official(tensors), facts, vocabulary)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None


def _vocabulary(entries: Any, path: Path) -> tuple[str, ...] | None:
    if entries is None:
        return None
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
        raise CheckpointError(f'checkpoint {path}: "vocabulary" is not a list of WordPiece entries')
    lacking = [entry for entry in SPECIAL_TOKENS if entry not in entries]
    if lacking or len(set(entries)) != len(entries):
        what = f"lacks {lacking[0]}" if lacking else "has duplicate entries"
        raise CheckpointError(f'checkpoint {path}: "vocabulary" {what}; it must be a BERT WordPiece vocabulary')
    return tuple(entries)


def derive_config(state: StateDict, facts: Mapping[str, Any] | None = None, path: Path | str = "") -> GlipConfig:
    """Work out the whole architecture from key names and shapes.

    Shapes cannot tell the number of heads of the BERT layers (64 channels a head, as in every released model, unless
    `facts` says otherwise). `facts` is the optional `glip_config` entry of a checkpoint: `{"bert_heads": 12}`.

    Raises:
        CheckpointError: not a GLIP, or one of a kind that is not supported.
    """
    family = unsupported_family(state)
    if family is not None:
        raise CheckpointError(f"checkpoint {path} {family}; {SUPPORTED}")
    missing = [key for key in MARKERS if key not in state]
    if missing:
        seen = ", ".join(map(_short, list(state)[:3])) or "nothing"
        raise CheckpointError(
            f"checkpoint {path} is not a GLIP with a Swin backbone: {missing[0]} is missing (it starts with {seen}); "
            f"{SUPPORTED}"
        )
    try:
        return _derive(state, facts or {})
    except KeyError as error:
        raise CheckpointError(
            f"checkpoint {path} is incomplete: {error.args[0]} is missing; download it again"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None


def _short(key: str) -> str:
    """Return a name from a file as a message can hold it."""
    return key if len(key) <= 100 else f"{key[:97]}..."


def _shape(state: StateDict, key: str, axes: int) -> tuple[int, ...]:
    """Return the shape of a tensor that sizes are read from.

    Raises:
        KeyError: it is not there.
        ValueError: another number of axes, or an axis of length 0.
    """
    if state[key].is_nested:
        raise ValueError(f"{key} is nested, weights must be dense floating point; save them as float32")
    shape = tuple(state[key].shape)
    if len(shape) != axes or 0 in shape:
        raise ValueError(f"{key} is {shape}, GLIP needs {axes} axes of at least 1; this is another architecture")
    return shape


def _check_sizes(config: GlipConfig) -> None:
    """Raise ValueError where sizes do not divide as the model needs them to, or a window's index would be too large."""
    swin, head = config.swin, config.head
    if swin.window > LARGEST_WINDOW:
        raise ValueError(
            f"the Swin window is {swin.window}; windows are supported up to {LARGEST_WINDOW}; GLIP's have 7 and 12"
        )
    divisions = [
        *(
            (f"channels of Swin stage {i}", width, "attention heads", heads)
            for i, (width, heads) in enumerate(zip(swin.channels, swin.num_heads, strict=True))
        ),
        ("channels of the head", head.channels, "groups of its GroupNorm", head.group_norm_groups),
    ]
    if head.fusion:
        divisions.append(("width of the fusion", head.fusion_dim, "attention heads", head.fusion_heads))
    for what, width, parts, number in divisions:
        if width % number:
            raise ValueError(f"the {what}, {width}, cannot be divided by the {number} {parts}; GLIP's always can")


def _bert_heads(facts: Mapping[str, Any], hidden: int) -> int:
    heads = facts.get("bert_heads", max(1, hidden // 64))
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or hidden % heads:
        raise ValueError(f"glip_config says bert_heads = {heads!r}; it must be a divisor of the text width {hidden}")
    return heads


def _count(state: StateDict, pattern: str) -> int:
    """Return how many indices `pattern`'s group matches, which must be 0, 1, 2 and so on.

    Raises:
        ValueError: one is missing; the largest alone says nothing about how many layers there are.
    """
    regex = re.compile(pattern)
    keys = {int(match[1]): key for key in state if (match := regex.match(key))}
    for i, index in enumerate(sorted(keys)):
        if i != index:
            raise ValueError(
                f"{_short(keys[index])} is there, but none of number {i}; the file is damaged or another architecture"
            )
    return len(keys)


def _derive(state: StateDict, facts: Mapping[str, Any]) -> GlipConfig:
    body = "backbone.body."
    stages = _count(state, r"backbone\.body\.layers\.(\d{1,4})\.")
    if stages != len(SwinConfig().depths):
        raise ValueError(f"the Swin backbone has {stages} stages, GLIP's has 4; this is another architecture")
    blocks = [f"{body}layers.{i}.blocks.0." for i in range(stages)]
    tables = [_shape(state, f"{block}attn.relative_position_bias_table", 2) for block in blocks]
    swin = SwinConfig(
        embed_dim=_shape(state, f"{body}patch_embed.proj.weight", 4)[0],
        depths=tuple(_count(state, rf"backbone\.body\.layers\.{i}\.blocks\.(\d{{1,4}})\.") for i in range(stages)),
        num_heads=tuple(shape[1] for shape in tables),
        window=(round(tables[0][0] ** 0.5) + 1) // 2,
        mlp_hidden=tuple(_shape(state, f"{block}mlp.fc1.weight", 2)[0] for block in blocks),
    )
    vocabulary, hidden = _shape(state, f"{BERT}embeddings.word_embeddings.weight", 2)
    heads = _bert_heads(facts, hidden)
    bert = BertConfig(
        hidden=hidden,
        layers=_count(state, r"language_backbone\.body\.model\.encoder\.layer\.(\d{1,4})\."),
        heads=heads,
        intermediate=_shape(state, f"{BERT}encoder.layer.0.intermediate.dense.weight", 2)[0],
        vocabulary=vocabulary,
        positions=_shape(state, f"{BERT}embeddings.position_embeddings.weight", 2)[0],
    )
    fusion = f"{TOWER}0.b_attn.gamma_v" in state
    modules = _count(state, r"rpn\.head\.dyhead_tower\.(\d{1,4})\.")
    head = HeadConfig(
        channels=_shape(state, "rpn.head.bbox_pred.weight", 4)[1],
        blocks=modules // 3 if fusion else modules,
        fusion=fusion,
        bert_heads=heads,
    )
    if fusion:
        embed = _shape(state, f"{TOWER}0.b_attn.attn.v_proj.weight", 2)[0]
        head = replace(
            head,
            fusion_dim=embed,
            bert_intermediate=_shape(state, f"{TOWER}1.intermediate.dense.weight", 2)[0],
        )
    tuned = "rpn.tunable_linear.weight"
    config = GlipConfig(swin, bert, head, tunable_tokens=_shape(state, tuned, 2)[0] if tuned in state else 0)
    _check_sizes(config)
    return replace(config, input=replace(config.input, max_tokens=min(InputConfig().max_tokens, config.longest_text)))


def build(
    state: StateDict, config: GlipConfig, path: Path | str = "", deform: DeformConv | None = None
) -> tuple[Glip, tuple[str, ...]]:
    """Return (model with these weights, keys that were ignored).

    Args:
        state: tensors by official key.
        config: of `derive_config`.
        path: of the checkpoint, for messages.
        deform: computes the deformable convolutions; by default `glip_export.model.deform.deform_conv2d`.

    Raises:
        CheckpointError: a missing or misshapen key, an unknown key in the inference path, NaN or infinite weights,
            anchors other than GLIP's.
    """
    import torch

    from glip_export.model.blank import blank
    from glip_export.model.deform import deform_conv2d
    from glip_export.model.glip import Glip

    _check_anchors(state, config, path)
    first_dyconv = f"{TOWER}{2 if config.head.fusion else 0}."
    fc = state.get(f"{first_dyconv}relu.fc.0.weight")
    if fc is not None:
        _check_dense(f"{first_dyconv}relu.fc.0.weight", fc, path)
    squeeze = 64 if fc is None or fc.dim() != 2 or 0 in fc.shape else fc.shape[0]
    with blank():
        model = Glip(config, squeeze, deform or deform_conv2d)
    wanted = model.state_dict()
    rebuilt = {key for key in wanted if EXPECTED_EXTRAS.search(key)}
    missing = [key for key in wanted if key not in state and key not in rebuilt]
    if missing:
        raise CheckpointError(
            f"checkpoint {path} is incomplete for {config.variant}: {len(missing)} tensors are missing, "
            f"the first is {missing[0]}; download it again"
        )
    ignored = tuple(key for key in state if key not in wanted or key in rebuilt)
    foreign = [k for k in ignored if INFERENCE_PATH.match(k) and not EXPECTED_EXTRAS.search(k)]
    if foreign:
        raise CheckpointError(
            f"checkpoint {path} has {len(foreign)} tensors that {config.variant} has no place for, the first is "
            f"{_short(foreign[0])}; this is another architecture"
        )
    weights: dict[str, torch.Tensor] = {}
    for key, slot in wanted.items():
        if key in rebuilt:
            continue
        value = state[key]
        _check_dense(key, value, path)
        if value.shape != slot.shape:
            raise CheckpointError(
                f"checkpoint {path}: {key} is {tuple(value.shape)}, {config.variant} needs {tuple(slot.shape)}"
            )
        value = value.to(slot.dtype)
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"checkpoint {path}: {key} holds NaN or infinite values; the training diverged or the file is damaged"
            )
        weights[key] = value
    for key in rebuilt:
        weights[key] = _rebuild(key, config)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False), ignored


def _check_dense(key: str, value: torch.Tensor, path: Path | str) -> None:
    """Raise CheckpointError for a tensor whose values are not all in the file, as floating-point numbers."""
    kind = irregularity(value)
    if kind is not None:
        raise CheckpointError(
            f"checkpoint {path}: {key} is {kind}, weights must be dense floating point; save them as float32"
        )


def _rebuild(key: str, config: GlipConfig) -> torch.Tensor:
    import torch

    from glip_export.model.swin import relative_position_index

    if key.endswith("relative_position_index"):
        return relative_position_index(config.swin.window)
    return torch.arange(config.bert.positions)[None]


def _check_anchors(state: StateDict, config: GlipConfig, path: Path | str) -> None:
    """Refuse anchors other than GLIP's, which the decoding of boxes has built in (8 strides wide, one a location)."""
    for i, stride in enumerate(config.head.strides):
        key = f"rpn.anchor_generator.cell_anchors.{i}"
        cell = state.get(key)
        if cell is not None:
            _check_dense(key, cell, path)
        expected = [-3.5 * stride, -3.5 * stride, 4.5 * stride - 1, 4.5 * stride - 1]
        if cell is not None and cell.flatten().tolist() != expected:
            raise CheckpointError(
                f"checkpoint {path}: anchors of level {i} are {cell.flatten().tolist()}, GLIP's are {expected}; "
                "other anchors are not supported"
            )
