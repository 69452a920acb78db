"""Checkpoint to bundle, all or nothing: written to a temporary folder beside the target, then put in its place."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy import __version__
from glip_deploy.bundle.contract import GraphContract
from glip_deploy.bundle.manifest import FORMAT, FORMAT_VERSION, MANIFEST, TOKENIZER
from glip_deploy.errors import CheckpointError, OptionError, OutputError
from glip_deploy.files import deliver_folder, not_written, sha256_of, temporary_sibling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from glip_export.checkpoints import Checkpoint
    from glip_export.verify import ParityRow

__all__ = ["BUNDLE_PRECISIONS", "ExportResult", "Step", "export_bundle", "steps"]

BUNDLE_PRECISIONS = ("fp32", "fp16")
"""What ONNX Runtime's CPU runs; engines are built in more."""


class Step(StrEnum):
    """A step of an export, in order."""

    READ = "read the checkpoint"
    TRACE_TEXT = "trace the text branch"
    TRACE_IMAGE = "trace the image branch"
    VERIFY_TEXT = "verify the text branch"
    VERIFY_IMAGE = "verify the image branch"
    VERIFY_SPLIT = "verify the image branch in two parts"
    LOWER = "lower all graphs to fp16"
    WRITE = "write the manifest"


def steps(precision: str) -> tuple[Step, ...]:
    """Return the steps of an export in a precision of BUNDLE_PRECISIONS, in order."""
    return tuple(step for step in Step if step is not Step.LOWER or precision != "fp32")


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        path: the bundle.
        manifest: the content of its manifest.
        ignored: keys of the checkpoint that inference does not use.
    """

    path: Path
    manifest: dict[str, Any]
    ignored: tuple[str, ...]


def export_bundle(
    checkpoint: Path,
    output: Path,
    *,
    config_file: Path | None = None,
    precision: str = "fp32",
    raw_outputs: bool = False,
    overwrite: bool = False,
    on_step: Callable[[Step], None] = lambda step: None,
) -> ExportResult:
    """Export a checkpoint.

    Args:
        checkpoint: a GLIP `.pth`, in the official form or in mmdetection's.
        output: the bundle's folder; must not exist or be empty, unless `overwrite` and it is a bundle. Folders above it
            are made. A symbolic link is followed.
        config_file: an official YAML.
        precision: one of BUNDLE_PRECISIONS; "fp16" halves the files, and the manifest says what it costs in accuracy.
        raw_outputs: let the image graph also give logits, deltas and centerness.
        overwrite: replace an existing bundle.
        on_step: called with each of `steps(precision)` as it begins.

    Raises:
        OptionError: the precision or the YAML cannot be used.
        CheckpointError: the checkpoint cannot be used.
        ParityError: a graph does not compute what torch does.
        OutputError: the target exists or cannot be written, or the disk is full.

        Nothing is left behind, whatever is raised; a bundle that was there is untouched.
    """
    from glip_export.checkpoints import load_checkpoint
    from glip_export.tokenizer import build_tokenizer

    if precision not in BUNDLE_PRECISIONS:
        raise OptionError(f'precision is "{precision}"; a bundle is {" or ".join(BUNDLE_PRECISIONS)}')
    _check_target(output, overwrite)
    on_step(Step.READ)
    loaded = load_checkpoint(checkpoint, config_file)
    tokenizer = build_tokenizer(loaded.vocabulary)
    if tokenizer.get_vocab_size() != loaded.config.bert.vocabulary:
        raise CheckpointError(
            f"checkpoint {checkpoint} has a vocabulary of {loaded.config.bert.vocabulary} entries,"
            f" bert-base-uncased has {tokenizer.get_vocab_size()}; it must carry its own as"
            ' {"model": ..., "vocabulary": [...]}'
        )
    try:
        with temporary_sibling(output) as folder:
            # Not Tokenizer.save: it raises bare Exception where the disk is full.
            (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            io, rows = _write_graphs(loaded, tokenizer, folder, precision, raw_outputs, on_step)
            on_step(Step.WRITE)
            manifest: dict[str, Any] = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "variant": loaded.config.variant,
                "precision": precision,
                "checkpoint": {"file": checkpoint.name, "sha256": loaded.sha256, "ignored": list(loaded.ignored)},
                "config": loaded.config.to_dict(),
                "io": {graph: contract.to_dict() for graph, contract in io.items()},
                "files": {
                    file.name: {"sha256": sha256_of(file), "bytes": file.stat().st_size}
                    for file in sorted(folder.iterdir())
                },
                "parity": [row.to_dict() for row in rows],
                "tools": _versions(),
            }
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            target = _check_target(output, overwrite)  # again: another export may have ended in the meantime
            deliver_folder(folder, target, overwrite=overwrite)
    except OSError as error:
        raise OutputError(f"--output {not_written(output, error)}; nothing was written") from None
    return ExportResult(output, manifest, loaded.ignored)


def _write_graphs(
    loaded: Checkpoint,
    tokenizer: Tokenizer,
    folder: Path,
    precision: str,
    raw_outputs: bool,
    on_step: Callable[[Step], None],
) -> tuple[dict[str, GraphContract], list[ParityRow]]:
    """Write all graphs and compare each with torch; return what they take and give by name, and the comparison."""
    import torch

    from glip_export import verify
    from glip_export.onnx_export import (
        drop_raw_outputs,
        export_image,
        export_text,
        lower_graph,
        share_weights,
        split_image,
    )

    model = loaded.model
    with torch.inference_mode():
        on_step(Step.TRACE_TEXT)
        text = export_text(model, folder)
        on_step(Step.TRACE_IMAGE)
        image = export_image(model, folder)
        backbone, head = split_image(model, image, folder)
        on_step(Step.VERIFY_TEXT)
        rows = verify.verify_text(model, folder, tokenizer)
        verify.check(rows)
        on_step(Step.VERIFY_IMAGE)
        torchs = verify.reference(model, tokenizer)
        rows += verify.verify_image(model, folder, torchs)
        verify.check(rows)
        on_step(Step.VERIFY_SPLIT)
        rows += verify.verify_split(model, folder, torchs)
        verify.check(rows)
        if precision != "fp32":
            on_step(Step.LOWER)
            rows += verify.verify_precision(model, folder, tokenizer, precision, torchs)
            verify.check(rows)
            for contract in (text, backbone, head, image):  # the image graph last: the parts read its weights
                lower_graph(folder / contract.file, precision)
            for contract in (backbone, head):
                share_weights(folder / contract.file, folder / image.file)
        if not raw_outputs:
            image, head = (drop_raw_outputs(contract, folder) for contract in (image, head))
            if precision == "fp32":
                verify.check(verify.verify_image(model, folder, torchs))
                verify.check(verify.verify_split(model, folder, torchs))
    return {"text": text, "image": image, "backbone": backbone, "head": head}, rows


def _versions() -> dict[str, str]:
    tools = {name: metadata.version(name) for name in ("torch", "onnx", "onnxruntime", "tokenizers", "numpy")}
    return {**tools, "glip-deploy": __version__, "python": platform.python_version()}


def _check_target(output: Path, overwrite: bool) -> Path:
    """Return the folder to write, links resolved; nothing is made yet."""
    try:
        target = output.resolve()
        if target.exists():
            if not target.is_dir():
                raise OutputError(f"--output {output} is a file; name a directory that does not exist yet")
            if any(target.iterdir()):
                if not overwrite:
                    raise OutputError(f"--output {output} exists; name another directory, or add --overwrite")
                if not (target / MANIFEST).is_file():
                    raise OutputError(
                        f"--output {output} is not a bundle and will not be replaced; name another directory"
                    )
        above = next(folder for folder in target.parents if folder.exists())
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"--output {output} cannot be used ({reason}); name another directory") from None
    if not above.is_dir():
        raise OutputError(f"--output {output}: {target.parent} cannot be created ({above} is a file)")
    if not os.access(above, os.W_OK):
        raise OutputError(f"--output {output}: {above} is not writable; name another directory")
    return target
