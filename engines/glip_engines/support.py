"""Which TensorRT runs on which GPU, so that a pair that cannot work is refused before minutes are spent on it.

By NVIDIA's support matrices and release notes of TensorRT 8.6 to 11; `docs/deploy/gpus.md` has the same table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glip_deploy.errors import EngineError
from glip_engines.flavours import Flavour

if TYPE_CHECKING:
    from glip_engines.flavours import Dialect

__all__ = ["SUPPORT", "Support", "check_pair"]


@dataclass(frozen=True)
class Support:
    """The versions of the full TensorRT that support one compute capability."""

    compute_capability: int
    """80 for 8.0."""
    gpus: str
    """Well-known GPUs of it."""
    least: tuple[int, int]
    most: tuple[int, int] | None
    """The last version; None while the newest one does."""
    install: str
    """What brings a version that is documented to work."""

    @property
    def versions(self) -> str:
        """The range in words: "8.6", "8.6 to 10.4", "10.8 or newer"."""
        least = ".".join(map(str, self.least))
        if self.most is None:
            return f"{least} or newer"
        return least if self.most == self.least else f"{least} to {'.'.join(map(str, self.most))}"


_8_6 = "pip install tensorrt==8.6.1.post1 --extra-index-url https://pypi.nvidia.com"
_10_4 = "pip install tensorrt-cu12==10.4.0"
_NEW = "pip install -U tensorrt"
_JETPACK = "install NVIDIA's newer JetPack, which brings it"

SUPPORT = (
    Support(60, "P100", (8, 6), (8, 6), _8_6),
    Support(61, "P4, P40, GTX 10", (8, 6), (8, 6), _8_6),
    Support(70, "V100", (8, 6), (10, 4), _10_4),
    Support(75, "T4, RTX 20", (8, 6), None, _NEW),
    Support(80, "A100, A30", (8, 6), None, _NEW),
    Support(86, "A10, RTX 30", (8, 6), None, _NEW),
    Support(87, "Jetson Orin", (8, 6), None, _JETPACK),
    Support(89, "L4, L40S, RTX 40", (8, 6), None, _NEW),
    Support(90, "H100, H200", (8, 6), None, _NEW),
    Support(100, "B200", (10, 8), None, _NEW),
    Support(110, "Jetson Thor", (10, 13), None, _JETPACK),
    Support(120, "RTX 50", (10, 8), None, _NEW),
)
"""By compute capability. One that is not listed is left to TensorRT."""


def check_pair(dialect: Dialect, gpu: str) -> None:
    """Raise if this version of the full TensorRT is known not to support its target.

    Args:
        dialect: flavor, version and compute capability.
        gpu: the GPU's name, for the message.

    Raises:
        EngineError: it is too old or too new for the GPU; the message names the versions that are not.
    """
    row = next((row for row in SUPPORT if row.compute_capability == dialect.compute_capability), None)
    numbers = re.match(r"(\d+)\.(\d+)", dialect.version)
    if row is None or numbers is None or dialect.flavour is not Flavour.TENSORRT:
        return
    version = int(numbers[1]), int(numbers[2])
    too_new = row.most is not None and version > row.most
    if too_new or version < row.least:
        raise EngineError(
            f"tensorrt {dialect.version} is too {'new' if too_new else 'old'} for {gpu} (SM{row.compute_capability}),"
            f" which TensorRT {row.versions} supports; {row.install}"
        )
