"""Checkpoint to bundle, all or nothing: written to a temporary directory beside the target, then renamed."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from glip_deploy.bundle.manifest import FORMAT, FORMAT_VERSION, MANIFEST, TOKENIZER
from glip_deploy.errors import GlipError
from glip_deploy.files import sha256_of

__all__ = ["BUNDLE_PRECISIONS", "ExportResult", "export_bundle", "steps"]

BUNDLE_PRECISIONS = ("fp32", "fp16")
"""What ONNX Runtime's CPU runs; engines are built in more."""


def steps(precision: str) -> tuple[str, ...]:
    """Return what an export does, in order."""
    lower = () if precision == "fp32" else (f"lower both branches to {precision}",)
    return (
        "read the checkpoint",
        "trace the text branch",
        "trace the image branch",
        "verify the text branch",
        "verify the image branch",
        *lower,
        "write the manifest",
    )


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

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
    on_step: Callable[[str], None] = lambda step: None,
) -> ExportResult:
    """Export a checkpoint.

    Args:
        checkpoint: an official GLIP `.pth`.
        output: the bundle's directory; must not exist or be empty, unless `overwrite` and it is a bundle. Folders
            above it are made. A symbolic link is followed.
        config_file: an official YAML.
        precision: one of BUNDLE_PRECISIONS; "fp16" halves the files and says what it costs in accuracy.
        raw_outputs: let the image graph also give logits, deltas and centerness.
        overwrite: replace an existing bundle.
        on_step: called with each of `steps(precision)` as it begins.

    Raises:
        GlipError: whatever is wrong with the checkpoint, the target, the disk or the graphs; nothing is left behind.
    """
    import torch

    from glip_export import verify
    from glip_export.checkpoints import load_checkpoint
    from glip_export.onnx_export import drop_raw_outputs, export_image, export_text, lower_graph
    from glip_export.tokenizer import build_tokenizer

    if precision not in BUNDLE_PRECISIONS:
        raise GlipError(f'precision is "{precision}"; a bundle is {" or ".join(BUNDLE_PRECISIONS)}')
    _check_target(output, overwrite)
    names = iter(steps(precision))
    on_step(next(names))
    loaded = load_checkpoint(checkpoint, config_file)
    model = loaded.model
    with _temporary_sibling(output) as directory, torch.inference_mode():
        tokenizer = build_tokenizer(loaded.vocabulary)
        if tokenizer.get_vocab_size() != loaded.config.bert.vocabulary:
            raise GlipError(
                f"checkpoint {checkpoint} has a vocabulary of {loaded.config.bert.vocabulary} entries,"
                f" bert-base-uncased has {tokenizer.get_vocab_size()}; it must carry its own as"
                ' {"model": ..., "vocabulary": [...]}'
            )
        # Not Tokenizer.save: it raises bare Exception where the disk is full.
        (directory / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        on_step(next(names))
        text = export_text(model, directory)
        on_step(next(names))
        image = export_image(model, directory)
        on_step(next(names))
        rows = verify.verify_text(model, directory, tokenizer)
        verify.check(rows)
        on_step(next(names))
        rows += verify.verify_image(model, directory, tokenizer)
        verify.check(rows)
        if precision != "fp32":
            on_step(next(names))
            rows += verify.verify_precision(model, directory, tokenizer, precision)
            verify.check(rows)
            for contract in (text, image):
                lower_graph(directory / contract.file, precision)
        if not raw_outputs:
            image = drop_raw_outputs(image, directory)
            if precision == "fp32":
                verify.check(verify.verify_image(model, directory, tokenizer))
        on_step(next(names))
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "variant": loaded.config.variant,
            "precision": precision,
            "checkpoint": {"file": checkpoint.name, "sha256": loaded.sha256, "ignored": list(loaded.ignored)},
            "config": loaded.config.to_dict(),
            "io": {"text": text.to_dict(), "image": image.to_dict()},
            "files": {
                file.name: {"sha256": sha256_of(file), "bytes": file.stat().st_size}
                for file in sorted(directory.iterdir())
            },
            "parity": [row.to_dict() for row in rows],
            "tools": _versions(),
        }
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for file in directory.iterdir():
            file.chmod(0o644)
        _deliver(directory, output, overwrite)
    return ExportResult(output, manifest, loaded.ignored)


def _versions() -> dict[str, str]:
    tools = {name: metadata.version(name) for name in ("torch", "onnx", "onnxruntime", "tokenizers", "numpy")}
    try:
        tools["glip-deploy"] = metadata.version("glip-deploy")
    except metadata.PackageNotFoundError:
        tools["glip-deploy"] = "source tree"
    return {**tools, "python": platform.python_version()}


def _check_target(output: Path, overwrite: bool) -> Path:
    """Return the directory to write, links resolved; nothing is made yet."""
    try:
        target = output.resolve()
        if target.exists():
            if not target.is_dir():
                raise GlipError(f"--output {output} is a file; name a directory that does not exist yet")
            if any(target.iterdir()):
                if not overwrite:
                    raise GlipError(f"--output {output} exists; name another directory, or add --overwrite")
                if not (target / MANIFEST).is_file():
                    raise GlipError(
                        f"--output {output} is not a bundle and will not be replaced; name another directory"
                    )
        above = next(folder for folder in target.parents if folder.exists())
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = error.strerror if isinstance(error, OSError) else error
        raise GlipError(f"--output {output} cannot be used ({reason}); name another directory") from None
    if not above.is_dir():
        raise GlipError(f"--output {output}: {target.parent} cannot be created ({above} is a file)")
    if not os.access(above, os.W_OK):
        raise GlipError(f"--output {output}: {above} is not writable; name another directory")
    return target


@contextmanager
def _temporary_sibling(output: Path) -> Iterator[Path]:
    """A directory on the same disk as `output`, gone afterwards whatever happens, and so are folders made for it."""
    parent = output.resolve().parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    directory: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(dir=parent, prefix=f".{output.name[:32]}-"))
        yield directory
    except OSError as error:
        free = ""
        with suppress(OSError):
            free = f" {shutil.disk_usage(parent).free / 1e9:.1f} GB are free there"
        raise GlipError(
            f"--output {output}: writing failed ({error.strerror or error}); nothing was written.{free}"
        ) from None
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):  # the first that holds something, the bundle above all, ends it
            for folder in made:
                folder.rmdir()


def _deliver(directory: Path, output: Path, overwrite: bool) -> None:
    """Rename into place; an old bundle is put aside first, so that a failure leaves one of the two whole."""
    target = _check_target(output, overwrite)  # again: another export may have ended in the meantime
    directory.chmod(0o755)
    if not target.exists():
        directory.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:32]}-old-"))
    old.rmdir()
    target.rename(old)
    try:
        directory.rename(target)
    except BaseException:  # Ctrl-C included
        if target.exists():  # another export was quicker
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
