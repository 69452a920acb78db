"""What requests and answers hold: their forms, as OpenAPI shows them, and how they are read from JSON and multipart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from glip_deploy.errors import OptionError, PromptError, reason_of, shown
from glip_deploy.frames.geometry import check_whole
from glip_deploy.prompts.syntax import Caption, ClassName, Phrases
from glip_deploy.prompts.tokens import thresholds
from glip_deploy.serve.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from starlette.requests import Request

    from glip_deploy.prompts.encoded import EncodedPrompt
    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.serve.settings import Settings

__all__ = [
    "DetectBody",
    "EncodeBody",
    "form_schema",
    "json_schemas",
    "limits_of",
    "prompts_of",
    "read_detect",
    "read_encode",
]

Body = TypeVar("Body")
Value = TypeVar("Value")
_FIELDS = ("image", "prompt", "threshold", "phrases", "max_detections", "model")
_MOST_DETECTIONS = 10_000
_LONG = 2**18


class NameBody(msgspec.Struct, forbid_unknown_fields=True):
    """A class with words around it that describe it but do not score."""

    name: str
    prefix: str = ""
    suffix: str = ""


class CaptionBody(msgspec.Struct, forbid_unknown_fields=True):
    """A caption and where its phrases are."""

    text: str
    spans: Annotated[
        list[list[int | list[int]]],
        Meta(description="For each phrase a pair of character positions, the end exclusive, or a list of such pairs."),
    ]
    phrases: Annotated[list[str] | None, Meta(description="Labels; by default the words of the spans.")] = None


PromptBody = str | list[str | NameBody] | CaptionBody
ThresholdBody = float | list[float] | dict[str, float]
_PROMPT = Meta(
    description="A caption or a dotted list, a list of class names, or a caption with spans.",
    examples=["person. traffic light"],
)
_MODEL = Meta(description="Name of a bundle; the first that the server was given, where it is left out.")
_HOW = Meta(description="What scores in a text without brackets: auto, whole (noun phrases) or dots.")


class DetectBody(msgspec.Struct, forbid_unknown_fields=True):
    """A picture and what is looked for in it."""

    image: Annotated[bytes, Meta(description="The file, JPEG or PNG, in base64.")]
    prompt: Annotated[PromptBody | None, _PROMPT] = None
    prompts: Annotated[
        list[PromptBody] | None, Meta(description="Several prompts instead of one; the answer then holds results.")
    ] = None
    threshold: Annotated[
        float | list[float | list[float] | dict[str, float]] | dict[str, float],
        Meta(description="Scores must exceed it: one number, one a class, or numbers by phrase; a list for prompts."),
    ] = 0.5
    phrases: Annotated[str, _HOW] = "auto"
    max_detections: Annotated[int | None, Meta(description="Most boxes of a prompt.")] = None
    model: Annotated[str | None, _MODEL] = None


class EncodeBody(msgspec.Struct, forbid_unknown_fields=True):
    """A prompt that is to be looked for later."""

    prompt: Annotated[PromptBody, _PROMPT]
    phrases: Annotated[str, _HOW] = "auto"
    model: Annotated[str | None, _MODEL] = None


class Box(msgspec.Struct):
    """Corners in pixels of the picture."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float


class Detected(msgspec.Struct):
    """A box."""

    score: float
    label: Annotated[str, Meta(description="The phrase.")]
    box: Box


class Answer(msgspec.Struct):
    """What glip-detect writes for a picture."""

    source: Annotated[str, Meta(description="The name of the file that was sent, or image.")]
    frame: int
    width: int
    height: int
    detections: list[Detected]
    prompt: Annotated[str | None, Meta(description="With several prompts, which.")] = None


class Answers(msgspec.Struct):
    """An answer for each of several prompts."""

    results: list[Answer]


class Encoded(msgspec.Struct):
    """A prompt as the model sees it."""

    model: str
    phrases: Annotated[list[str], Meta(description="Labels of its classes.")]
    prompts: Annotated[list[EncodedPart], Meta(description="What is run: one, or several for a long list.")]


class EncodedPart(msgspec.Struct):
    """A prompt that is run at once."""

    caption: str
    phrases: list[str]
    tokens: int


class ModelBody(msgspec.Struct):
    """An open bundle."""

    name: str
    variant: str
    max_tokens: int
    max_detections: int
    shortest_side: int
    longest_side: int | None


class ModelsBody(msgspec.Struct):
    """All open bundles; the first is asked where none is named."""

    models: list[ModelBody]


class ProblemBody(msgspec.Struct):
    """What went wrong, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: Annotated[str, Meta(description="One line: the value, what is legal, what to do next.")]


class StatusBody(msgspec.Struct):
    """Whether the server is there."""

    status: str
    models: list[str] = []


def json_schemas() -> dict[str, Any]:
    """Return the schemas of all bodies by name, for OpenAPI."""
    kinds = (DetectBody, EncodeBody, Answer, Answers, Encoded, ModelsBody, ProblemBody, StatusBody)
    return dict(msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")[1])


def form_schema() -> dict[str, Any]:
    """Return the schema of the multipart form of `DetectBody`, for OpenAPI."""
    text = {"type": "string"}
    return {
        "type": "object",
        "required": ["image", "prompt"],
        "properties": {
            "image": {"type": "string", "format": "binary", "description": "The file, JPEG or PNG."},
            "prompt": {
                "type": "array",
                "items": text,
                "minItems": 1,
                "description": "A text, or in JSON a list of names or a caption with spans; repeatable.",
            },
            "threshold": {**text, "description": "A number; in JSON, a list or an object of numbers."},
            "phrases": {**text, "enum": [one.value for one in Phrases], "description": _HOW.description},
            "max_detections": {"type": "integer", "minimum": 1, "maximum": _MOST_DETECTIONS},
            "model": {**text, "description": _MODEL.description},
        },
    }


async def read_detect(request: Request, settings: Settings) -> tuple[DetectBody, str]:
    """Read the body of a request to detect, JSON or multipart; also return the name of the picture's file.

    Raises:
        RequestError: neither, or fields that are missing, unknown or of other types.
    """
    if _kind(request) == "multipart/form-data":
        return await _read_form(request, settings)
    return await _read_json(request, DetectBody), "image"


async def read_encode(request: Request) -> EncodeBody:
    """Read the body of a request to encode.

    Raises:
        RequestError: as `read_detect`.
    """
    return await _read_json(request, EncodeBody)


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read_json(request: Request, form: type[Body]) -> Body:
    kind = _kind(request)
    if kind != "application/json":
        forms = "application/json" + (" or multipart/form-data" if form is DetectBody else "")
        raise RequestError(415, f"the content type is {shown(kind)}; send {forms}")
    data = await request.body()
    if len(data) > _LONG:  # others need not wait for it
        return await asyncio.to_thread(_parsed, lambda: msgspec.json.decode(data, type=form))
    return _parsed(lambda: msgspec.json.decode(data, type=form))


def _parsed(parse: Callable[[], Value]) -> Value:
    try:
        return parse()
    except msgspec.ValidationError as error:
        raise RequestError(422, f"the body cannot be used: {reason_of(error)}; /docs says what it may hold") from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: text that is not UTF-8
        raise RequestError(400, f"the body is not JSON ({reason_of(error)}); send an object in UTF-8") from None


async def _read_form(request: Request, settings: Settings) -> tuple[DetectBody, str]:
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    class Parser(MultiPartParser):
        spool_max_size = settings.max_body + 1  # in memory: the body is limited, and nobody's pictures go to a disk

    stream: AsyncGenerator[bytes, None] = request.stream()
    parser = Parser(request.headers, stream, max_files=1, max_fields=32, max_part_size=settings.max_body)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(400, f"the form cannot be read ({reason_of(error)}); send multipart/form-data") from None
    try:
        values: dict[str, Any] = {}
        for name in form:
            if name not in _FIELDS:
                raise RequestError(422, f"the form has a field {shown(name)}; legal is {', '.join(_FIELDS)}")
            given = form.getlist(name)
            if len(given) > 1 and name != "prompt":
                raise RequestError(422, f"the form has the field {name} {len(given)} times; give it once")
            for one in given:
                if isinstance(one, UploadFile) != (name == "image"):
                    form_of = "a file" if name == "image" else "text, without a filename"
                    raise RequestError(422, f"the field {name} must be {form_of}")
            values[name] = given
        if "image" not in values:
            raise RequestError(422, "the form has no field image; send the picture as a file")
        file: UploadFile = values["image"][0]
        prompts = [_prompt_in_text(text) for text in values.get("prompt", ())]
        data = await file.read()
        body = DetectBody(
            image=data,
            prompt=prompts[0] if len(prompts) == 1 else None,
            prompts=prompts if len(prompts) > 1 else None,
            threshold=_threshold_in_text(values["threshold"][0]) if "threshold" in values else 0.5,
            phrases=values["phrases"][0] if "phrases" in values else "auto",
            max_detections=_whole_in_text(values["max_detections"][0]) if "max_detections" in values else None,
            model=values["model"][0] if "model" in values else None,
        )
        return body, file.filename or "image"
    finally:
        await form.close()


def _prompt_in_text(text: str) -> PromptBody:
    """Return a prompt of a form: a list or an object if it is one in JSON, else the text; [a dog] is a caption."""
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return msgspec.json.decode(text, type=list[str | NameBody] | CaptionBody)
        except (msgspec.DecodeError, ValueError, RecursionError):
            if text.lstrip()[:1] == "{":
                return _parsed(lambda: msgspec.json.decode(text, type=CaptionBody))
    return text


def _threshold_in_text(text: str) -> Any:
    try:
        return msgspec.json.decode(text, type=float | list[float | list[float] | dict[str, float]] | dict[str, float])
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise RequestError(
            422, f"threshold is {shown(text)}; give a number in [0, 1], or numbers in a list or an object in JSON"
        ) from None


def _whole_in_text(text: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return int(text)
    raise RequestError(422, f"max_detections is {shown(text)}; give a whole number of at least 1")


def prompts_of(body: DetectBody, settings: Settings) -> list[PromptText]:
    """Return the prompts of a request.

    Raises:
        PromptError: none, or more or longer ones than the server takes.
        OptionError: `max_detections` is outside its range.
    """
    if body.max_detections is not None:
        check_whole("max_detections", body.max_detections, 1, _MOST_DETECTIONS)
    if (body.prompt is None) == (body.prompts is None):
        which = "neither prompt nor prompts" if body.prompt is None else "both prompt and prompts"
        raise PromptError(f'the request has {which}; give one of them, for example "person. dog"')
    given = [body.prompt] if body.prompts is None else body.prompts
    if not given:
        raise PromptError("prompts is an empty list; give at least one prompt")
    if len(given) > settings.max_prompts:
        raise PromptError(f"{len(given)} prompts are given; at most {settings.max_prompts} are accepted in a request")
    return checked_prompts([one for one in given if one is not None], settings)


def checked_prompts(given: Sequence[PromptBody], settings: Settings) -> list[PromptText]:
    """Return prompts as `Detector.encode` takes them.

    Raises:
        PromptError: together they are longer than the server takes.
    """
    length = sum(map(_characters, given))
    if length > settings.max_characters:
        raise PromptError(
            f"the prompt has {length} characters; at most {settings.max_characters} are accepted; name fewer things"
        )
    return [_text(one) for one in given]


def _characters(prompt: PromptBody) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, CaptionBody):
        pieces = sum(1 + len(span) for span in prompt.spans)
        return len(prompt.text) + sum(map(len, prompt.phrases or ())) + pieces
    return sum(
        1 + (len(one) if isinstance(one, str) else len(one.name) + len(one.prefix) + len(one.suffix)) for one in prompt
    )


def _text(prompt: PromptBody) -> PromptText:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, CaptionBody):
        spans: Any = [
            tuple(span) if all(isinstance(end, int) for end in span) else [_pair(end) for end in span]
            for span in prompt.spans
        ]
        return Caption(prompt.text, spans, prompt.phrases)
    return [one if isinstance(one, str) else ClassName(one.name, one.prefix, one.suffix) for one in prompt]


def _pair(ends: int | list[int]) -> Any:
    return tuple(ends) if isinstance(ends, list) else ends


def label_of(prompt: PromptText) -> str:
    """Return how an answer names a prompt: its text, or its names with dots between."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Caption):
        return prompt.text
    return ". ".join(one if isinstance(one, str) else one.name for one in prompt)


def limits_of(body: DetectBody, encoded: Sequence[EncodedPrompt]) -> list[NDArray[np.float32]]:
    """Return (C,) float32 for each prompt, what scores must exceed.

    Raises:
        OptionError: numbers outside [0, 1], or not one for each prompt or class.
        PromptError: a phrase that a prompt does not have.
    """
    value: Any = body.threshold
    if body.prompts is None:
        of_prompt = [value]
    elif isinstance(value, list):
        if len(value) != len(encoded):
            raise OptionError(
                f"{len(value)} thresholds are given for {len(encoded)} prompts; give one for each, or a number"
            )
        of_prompt = value
    elif isinstance(value, dict):
        raise OptionError("thresholds by phrase belong to one prompt; give a list with one entry for each prompt")
    else:
        of_prompt = [value] * len(encoded)
    return [thresholds(one.phrases, limit) for one, limit in zip(encoded, of_prompt, strict=True)]


def encoded_answer(model: str, encoded: EncodedPrompt) -> dict[str, Any]:
    """Return what `Encoded` shows of a prompt."""
    parts = [
        {"caption": one.prompt.caption, "phrases": list(one.phrases), "tokens": len(one.prompt.input_ids)}
        for one in encoded.chunks
    ]
    return {"model": model, "phrases": list(encoded.phrases), "prompts": parts}


def dumped(value: object) -> bytes:
    """Return JSON in UTF-8; half a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", errors="replace")
