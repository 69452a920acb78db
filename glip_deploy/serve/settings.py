"""What a server was told on its command line."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from glip_deploy.errors import OptionError

__all__ = ["Settings", "is_local"]


@dataclass(frozen=True)
class Settings:
    """How a server is reached and what it takes.

    Attributes:
        host: name or address it listens on.
        port: and the port; 0 for any that is free.
        token: what a client has to know; None where nothing is asked.
        insecure: serve other machines without a token.
        track: follow objects through the streams of the live page.
        max_bytes: largest picture, as a file, that is accepted.
        max_pixels: largest picture, decoded.
        max_characters: longest prompt, all its names and labels together; of several prompts the sum.
        max_prompts: most prompts of one request.
        timeout: seconds that a request may take, from its first byte to the answer.
        queue_size: requests that may be under way; one more is answered with status 429.
        batch_size: most frames that are looked at together.
        batch_wait: seconds that a frame waits for others with the same prompt, once it could be looked at.
        drain: seconds that requests under way have to end after SIGTERM.

    Raises:
        OptionError: it would listen to other machines without a token, and was not told that this is meant; an empty
            token, or one that a header cannot carry.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    insecure: bool = False
    track: bool = False
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_characters: int = 20_000
    max_prompts: int = 16
    timeout: float = 60.0
    queue_size: int = 64
    batch_size: int = 1
    batch_wait: float = 0.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        if self.token is not None and not self.token:
            raise OptionError("the token is empty; give one of letters and digits, or none")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and " " not in self.token):
            raise OptionError("the token has spaces or characters that are not ASCII; give one of letters and digits")
        if not (self.token or self.insecure or is_local(self.host)):
            raise OptionError(
                f"host {self.host} can be reached from other machines;"
                " add --token TOKEN, or --insecure to let anybody in"
            )

    @property
    def local_only(self) -> bool:
        """Whether only this machine is served, and so only pages that it serves itself may ask."""
        return self.token is None and not self.insecure

    @property
    def max_body(self) -> int:
        """Largest body of a request, in bytes: a picture in base64, the longest prompt in JSON's escapes, and names."""
        return self.max_bytes * 4 // 3 + 12 * self.max_characters + 65_536


def is_local(host: str) -> bool:
    """Tell whether a name or an address is this machine's own, which no other machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
