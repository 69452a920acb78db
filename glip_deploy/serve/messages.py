"""Messages of the live page's websocket: JSON, or JSON and a picture in one; `glip_deploy.serve.live` says which."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from glip_deploy.errors import OptionError, reason_of, shown

__all__ = ["pack", "read_object", "unpack", "whole_number"]


def pack(header: Mapping[str, Any], picture: bytes) -> bytes:
    """Return a header and a picture as one binary message."""
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", errors="replace")
    return struct.pack(">I", len(text)) + text + picture


def unpack(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the picture of a binary message.

    Raises:
        OptionError: it is none.
    """
    if len(data) >= 4:
        (length,) = struct.unpack_from(">I", data)
        if 4 + length <= len(data):
            return read_object(data[4 : 4 + length]), data[4 + length :]
    raise OptionError(
        f"a binary message of {len(data)} bytes does not hold the header that its first four bytes announce;"
        " send the header's length, the header and the picture"
    )


def read_object(text: str | bytes) -> dict[str, Any]:
    """Return the object that a text is.

    Raises:
        OptionError: it is not JSON, or no object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"a message is not JSON ({reason_of(error)}); send an object with a type") from None
    if not isinstance(value, dict):
        raise OptionError(f"a message is {shown(value)}; send an object with a type")
    return value


def whole_number(value: object) -> int | None:
    """Return a value if it is a whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
