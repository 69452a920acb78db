"""What FFmpeg is given to open: a file, a camera or a network address, and how messages show it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from glip_deploy.errors import SourceError

__all__ = ["Address", "file_url", "live_address", "without_credentials"]

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_HIDDEN = "***"
# Query values whose names suggest credentials: user names, passwords, tokens, signatures.
_SECRET = re.compile(
    r"((?:user|usr|login|account|pass|pwd|psw|token|secret|key|auth|sig|credential|session)[a-z0-9_.-]*=)[^&;#/\s]*",
    re.IGNORECASE,
)

# FFmpeg goes by a file's content: a text that lists other files or addresses (concat, HLS, DASH, SDP, ...) would be
# followed, whatever its name. These are the formats that hold their pictures themselves.
_ONE_FILE = {
    "protocol_whitelist": "file",
    "format_whitelist": (
        "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,kux,mpeg,mpegts,mpegvideo,mpegtsraw,m4v,h261,h263,h264"
        ",hevc,vvc,evc,apv,av1,obu,ivf,vc1,vc1test,dirac,dnxhd,cavsvideo,avs2,avs3,mjpeg,mjpeg_2000,smjpeg,mpjpeg,asf,asf_o"
        ",ogg,nut,mxf,gxf,lxf,dv,dhav,wtv,rm,ivr,nsv,nuv,swf,yuv4mpegpipe,gif,apng,webp,webp_anim,jpegxl_anim,flic,film_cpk,bink"
        ",smk,roq,amv,xmv,vivo,viv,mtv,mlv,cine,r3d,pva,ty,usm,moflex,lmlm4"
    ),
}


@dataclass(frozen=True)
class Address:
    """A video as FFmpeg opens it.

    Attributes:
        target: the URL or device.
        name: what messages and results call it; without user, password and secret query values.
        format: FFmpeg's name of the input device; None to find out the format.
        options: FFmpeg's, by name.
        is_live: a camera or a stream, which gives frames at its own pace.
        is_remote: on the network, so that waiting for it has a time limit.
        file: the local file it is, if it is one.
    """

    target: str
    name: str
    format: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    is_live: bool = False
    is_remote: bool = False
    file: Path | None = None

    @classmethod
    def of_file(cls, path: Path) -> Address:
        """Return the address of a local file; a list of other files, whatever its name, is none."""
        return cls(file_url(path), str(path), options=dict(_ONE_FILE), file=path)


def file_url(path: Path) -> str:
    """Return what FFmpeg takes for a local file, whatever its name; "12:30.mp4" alone would be a protocol to it."""
    return f"file:{path}"


def live_address(text: str) -> Address | None:
    """Return the address of a camera, a stream or a URL; None for anything else, such as the path of a file.

    Raises:
        SourceError: a camera number on Windows, where cameras have names.
    """
    if text.lower().startswith("file://"):
        return Address(text, text, options=dict(_ONE_FILE), file=Path(text[len("file://") :]))
    if _SCHEME.match(text):
        name = without_credentials(text)
        if text.lower().startswith(("rtsp://", "rtsps://")):
            # UDP loses packets, which shows as smeared pictures; TCP does not.
            return Address(text, name, options={"rtsp_transport": "tcp"}, is_live=True, is_remote=True)
        on_the_web = text.lower().startswith(("http://", "https://"))
        return Address(text, name, is_live=not on_the_web, is_remote=True)
    if text.isdecimal() and not Path(text).exists():
        return _camera(text)
    if text.startswith("/dev/video") or (text.startswith("video=") and sys.platform == "win32"):
        return Address(text, text, format="dshow" if sys.platform == "win32" else "v4l2", is_live=True)
    return None


def without_credentials(url: str) -> str:
    """Return a URL in which user, password and query values that look like either are replaced by `***`.

    A password may hold "@", "/" or "?", where the URL itself becomes ambiguous. So if there is user information, or a
    port that is no number (as "/" in a password makes it), everything before the last "@" of all is replaced. Digits
    before a "/" are taken for a port: they cannot be told from a password that begins so.
    """
    scheme, slashes, rest = url.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    _, colon, port = re.sub(r"^\[[^]]*\]", "", authority).partition(":")
    if "@" in rest and ("@" in authority or (colon and not port.isdecimal())):
        rest = f"{_HIDDEN}@{rest.rpartition('@')[2]}"
    return scheme + slashes + _SECRET.sub(rf"\1{_HIDDEN}", rest)


def _camera(number: str) -> Address:
    name = f"camera {number}"
    if sys.platform == "darwin":
        return Address(number, name, format="avfoundation", options={"framerate": "30"}, is_live=True)
    if sys.platform == "win32":
        raise SourceError(
            f'{name}: cameras have names on Windows; give "video=NAME", with NAME from the Device Manager'
        )
    return Address(f"/dev/video{number}", name, format="v4l2", is_live=True)
