"""The model that Triton runs: pictures as bytes and a prompt in, detections out.

`glip-build --triton` writes a model repository; its `model.py` names the folder of the bundle and leaves the rest to
`GlipModel`. Triton's Python backend calls `initialize` once in every instance (a process of its own), then `execute`
with the requests that wait together, and `finalize` at the end.

Interface: https://github.com/triton-inference-server/python_backend. Its module `triton_python_backend_utils` exists
only inside Triton.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from glip_deploy.detector import Detector
from glip_deploy.errors import FrameError, GlipError, OptionError, PromptError, reason_of, shown
from glip_deploy.frames.load import decode_image
from glip_deploy.prompts.tokens import thresholds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy.prompts.encoded import EncodedPrompt
    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.results.detections import Detections

__all__ = ["BUNDLE", "INPUTS", "OUTPUTS", "PARAMETERS", "GlipModel", "Settings", "TensorSpec"]

log = logging.getLogger(__name__)

BUNDLE = "bundle"
"""Folder of the bundle, beside model.py."""


class TensorSpec(NamedTuple):
    """An input or output, without the batch axis."""

    name: str
    dtype: str
    """As config.pbtxt writes it."""
    dims: tuple[int, ...]
    optional: bool = False


INPUTS = (
    TensorSpec("IMAGE", "TYPE_STRING", (1,)),
    TensorSpec("PROMPT", "TYPE_STRING", (1,)),
    TensorSpec("THRESHOLD", "TYPE_FP32", (-1,), optional=True),
)
OUTPUTS = (
    TensorSpec("BOXES", "TYPE_FP32", (-1, 4)),
    TensorSpec("SCORES", "TYPE_FP32", (-1,)),
    TensorSpec("LABELS", "TYPE_INT64", (-1,)),
    TensorSpec("PHRASES", "TYPE_STRING", (-1,)),
    TensorSpec("COUNT", "TYPE_INT32", (1,)),
    TensorSpec("DETECTIONS", "TYPE_STRING", (1,)),
)
PARAMETERS = {
    "backend": "onnxruntime",
    "precision": "",
    "engines": "",
    "threads": "",
    "shortest_side": "800",
    "longest_side": "1333",
    "resize": "",
    "threshold": "0.5",
    "max_detections": "",
    "cache_dir": "",
}
"""Parameters in config.pbtxt and their defaults; empty is the default of `Detector.open` or `Detector.detect`."""

_NO_LABEL = -1
_DATA_URL = b"data:"


@dataclass(frozen=True)
class Settings:
    """What the parameters in config.pbtxt say."""

    options: Mapping[str, Any]
    """For `Detector.open`."""
    threshold: float
    max_detections: int | None

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Settings:
        """Read the parameters; those in capitals are Triton's own.

        Raises:
            OptionError: an unknown name, or a value that is no number where one is needed.
        """
        unknown = [name for name in parameters if name not in PARAMETERS and not name.isupper()]
        if unknown:
            raise OptionError(f"parameter {shown(unknown[0])} is unknown; legal is {', '.join(PARAMETERS)}")
        given = {**PARAMETERS, **{name: text.strip() for name, text in parameters.items()}}
        whole = {name: _whole(name, given[name]) for name in ("threads", "shortest_side", "longest_side")}
        options: dict[str, Any] = {
            "backend": given["backend"],
            "precision": given["precision"] or None,
            "engines": given["engines"] or None,
            "resize": given["resize"] or None,
            **whole,
            "longest_side": whole["longest_side"] or None,
        }
        if given["cache_dir"]:
            options["cache_dir"] = given["cache_dir"]
        try:
            threshold = float(given["threshold"])
        except ValueError:
            threshold = -1.0
        if not 0 <= threshold <= 1:
            raise OptionError(f"parameter threshold is {shown(given['threshold'])}; it must be a number in [0, 1]")
        return cls(options, threshold, _whole("max_detections", given["max_detections"]))


class _Row:
    """One picture of a request: what is asked, and then the detections or what went wrong."""

    def __init__(
        self, image: NDArray[np.uint8], text: bytes, prompt: EncodedPrompt, limits: NDArray[np.float32]
    ) -> None:
        self.image, self.prompt, self.limits = image, prompt, limits
        self.together = (text, image.shape)
        self.found: Detections | None = None
        self.error: Exception | None = None


class GlipModel:
    """What Triton's Python backend calls; model.py makes a subclass named `TritonPythonModel`.

    Pictures that wait together, of the same size and with the same prompt, are detected in one run; pictures of other
    sizes would change each other's results slightly, and are not. What is wrong with one request is that request's
    error alone, in the words of the command line.
    """

    folder: ClassVar[Path]
    """Where model.py is."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle.

        Args:
            args: Triton's: the configuration as JSON, kind and device of the instance.

        Raises:
            TritonModelException: the bundle cannot be opened, or a parameter is not legal.
        """
        self._triton: Any = importlib.import_module("triton_python_backend_utils")
        self._log = _Log(self._triton)
        logging.getLogger("glip_deploy").addHandler(self._log)
        config = json.loads(args["model_config"])
        self._max_batch = max(1, int(config.get("max_batch_size", 1)))
        if args.get("model_instance_kind") == "GPU":
            _see_only(int(args.get("model_instance_device_id", 0)))
        try:
            self._settings = Settings.of(
                {name: value.get("string_value", "") for name, value in config.get("parameters", {}).items()}
            )
            self._detector = Detector.open(self.folder / BUNDLE, **self._settings.options)
        except GlipError as error:
            raise self._triton.TritonModelException(str(error)) from error

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests that wait together, each with its detections or its error, in order."""
        prompts: dict[bytes, EncodedPrompt] = {}
        asked = [self._read(request, prompts) for request in requests]
        groups: dict[tuple[bytes, tuple[int, ...]], list[_Row]] = {}
        for rows in asked:
            for row in rows if isinstance(rows, list) else ():
                groups.setdefault(row.together, []).append(row)
        for group in groups.values():
            for first in range(0, len(group), self._max_batch):
                self._detect(group[first : first + self._max_batch])
        return [self._answer(request, rows) for request, rows in zip(requests, asked, strict=True)]

    def finalize(self) -> None:
        """Free the model."""
        self._detector.close()
        logging.getLogger("glip_deploy").removeHandler(self._log)

    def _read(self, request: Any, known: dict[bytes, EncodedPrompt]) -> list[_Row] | Exception:
        """Return the pictures of a request, or what is wrong with one of them."""
        if request.is_cancelled():
            return _CancelledError("the request was canceled")
        try:
            tensors = {one.name: self._triton.get_input_tensor_by_name(request, one.name) for one in INPUTS}
            arrays = {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
            images, prompts = arrays["IMAGE"].reshape(-1), arrays["PROMPT"].reshape(-1)
            limits = arrays.get("THRESHOLD")
            rows = []
            for place, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
                name = f"{place + 1} of {len(images)}" if len(images) > 1 else ""
                limit = (
                    [self._settings.threshold] if limits is None else limits.reshape(len(images), -1)[place].tolist()
                )
                if prompt not in known:
                    known[prompt] = self._detector.encode(_prompt(prompt))
                rows.append(self._row(image, prompt, known[prompt], limit, name))
        except Exception as error:
            return error
        return rows

    def _row(self, image: bytes, text: bytes, prompt: EncodedPrompt, limit: list[float], name: str) -> _Row:
        limits = thresholds(prompt.phrases, limit[0] if len(limit) == 1 else limit)
        return _Row(decode_image(_picture(image, name), name), text, prompt, limits)

    def _detect(self, rows: Sequence[_Row]) -> None:
        """Detect in pictures of one size with one prompt; each row gets its detections, or all get the error."""
        # A box above a row's own thresholds is above the lowest of all rows, which no box below them can change.
        lowest = np.min([row.limits for row in rows], axis=0)
        try:
            found = self._detector.detect_batch(
                [row.image for row in rows],
                rows[0].prompt,
                lowest.tolist(),
                color="rgb",
                max_detections=self._settings.max_detections,
            )
        except Exception as error:
            for row in rows:
                row.error = error
            return
        for row, one in zip(rows, found, strict=True):
            row.found = one[one.scores > row.limits[one.labels]]

    def _answer(self, request: Any, rows: list[_Row] | Exception) -> Any:
        failed = rows if isinstance(rows, Exception) else next((row.error for row in rows if row.error), None)
        if failed is not None:
            return self._triton.InferenceResponse(error=self._error(failed))
        assert isinstance(rows, list)
        wanted = set(request.requested_output_names()) or {one.name for one in OUTPUTS}
        found = [row.found for row in rows if row.found is not None]
        return self._triton.InferenceResponse(
            [self._triton.Tensor(name, array) for name, array in _outputs(found, wanted)]
        )

    def _error(self, error: Exception) -> Any:
        kinds = self._triton.TritonError
        if isinstance(error, _CancelledError):
            return kinds(str(error), kinds.CANCELLED)
        if isinstance(error, PromptError | FrameError | OptionError):
            return kinds(" ".join(str(error).split()), kinds.INVALID_ARG)
        if isinstance(error, GlipError):
            return kinds(" ".join(str(error).split()), kinds.INTERNAL)
        log.error("a request failed", exc_info=error)
        return kinds(f"{type(error).__name__}: {reason_of(error)}", kinds.INTERNAL)


class _CancelledError(Exception):
    """The client wants no answer any more."""


class _Log(logging.Handler):
    """Hands log records to Triton's log."""

    def __init__(self, triton: Any) -> None:
        super().__init__(logging.WARNING)
        self._triton = triton

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        write = self._triton.Logger.log_error if record.levelno >= logging.ERROR else self._triton.Logger.log_warn
        write(self.format(record))


def _outputs(found: Sequence[Detections], wanted: set[str]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Give the outputs of a request by name, pictures along the first axis.

    Those with fewer boxes than the picture with most are filled up: boxes and scores with 0, labels with -1, phrases
    with "". COUNT says how many are real.
    """
    rows, most = len(found), max((len(one) for one in found), default=0)
    empty: dict[str, NDArray[Any]] = {
        "BOXES": np.zeros((rows, most, 4), np.float32),
        "SCORES": np.zeros((rows, most), np.float32),
        "LABELS": np.full((rows, most), _NO_LABEL, np.int64),
        "PHRASES": np.full((rows, most), b"", np.object_),
        "COUNT": np.zeros((rows, 1), np.int32),
        "DETECTIONS": np.full((rows, 1), b"", np.object_),
    }
    for name, array in empty.items():
        if name not in wanted:
            continue
        for row, one in zip(array, found, strict=True):
            if name == "BOXES":
                row[: len(one)] = one.boxes
            elif name == "SCORES":
                row[: len(one)] = one.scores
            elif name == "LABELS":
                row[: len(one)] = one.labels
            elif name == "PHRASES":
                row[: len(one)] = [phrase.encode("utf-8", errors="replace") for phrase in one.phrases]
            elif name == "COUNT":
                row[0] = len(one)
            else:
                text = json.dumps(one.to_dicts(), ensure_ascii=False)
                row[0] = text.encode("utf-8", errors="replace")
        yield name, array


def _prompt(data: bytes) -> PromptText:
    """Return a prompt as the command line takes it, or the names of a JSON list.

    Raises:
        PromptError: it is not UTF-8.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"the prompt is not UTF-8 ({error.reason} at byte {error.start}); send it as UTF-8"
        ) from error
    if text.lstrip().startswith("["):
        try:
            names: list[str] = json.loads(text)
        except (ValueError, RecursionError):  # a caption that begins with a phrase in brackets
            return text
        return names
    return text


def _picture(data: bytes, name: str) -> bytes:
    """Return a picture's bytes; from a data URL, for clients that can only send text.

    Raises:
        FrameError: a data URL that does not hold base64.
    """
    if not data.startswith(_DATA_URL):
        return data
    head, _, body = data.partition(b",")
    try:
        if not head.endswith(b";base64"):
            raise ValueError("it does not say base64")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        what = f"picture {name}".strip()
        raise FrameError(
            f"{what} is a data URL that cannot be read ({error}); write data:image/jpeg;base64,..."
        ) from error


def _see_only(device: int) -> None:
    """Let this process see only one of the GPUs that the server sees, by its number there."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    known = [one.strip() for one in seen.split(",") if one.strip()]
    os.environ["CUDA_VISIBLE_DEVICES"] = known[device] if device < len(known) else str(device)


def _whole(name: str, text: str) -> int | None:
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"parameter {name} is {shown(text)}; it must be a whole number") from None
