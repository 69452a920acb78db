r"""Count the instructions of every kernel of the plugin for every GPU, and compare them with the committed budget.

    python benchmarks/kernels/budget.py            exit status 1 if a kernel has grown beyond its budget
    python benchmarks/kernels/budget.py --write    after a change that is worth it: the new counts, and a tenth more

Needs compilers (nvcc, NVRTC of CUDA 12 for the oldest GPUs) and no GPU. A loop that is unrolled further, or an index
that is computed in 64 bits, shows here before anything is timed; what a kernel loses to memory does not.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / room) for room in ("export", "engines", "benchmarks"))]

from glip_engines.compile import ARCHITECTURES, build_cubin  # noqa: E402

from glip_deploy.errors import GlipError  # noqa: E402
from glip_deploy.files import write_atomically  # noqa: E402

BUDGET = Path(__file__).with_suffix(".json")
SLACK = 1.1
"""Budget over count when it is written: compilers of other versions differ by some percent."""
_SECTION = struct.Struct("<IIQQQQIIQQ")
"""Of 64-bit ELF: name, kind, flags, address, offset, size, ..."""


def instructions(cubin: bytes, arch: int) -> dict[str, int]:
    """Return the number of machine instructions of every kernel, padding included.

    Args:
        cubin: machine code, an ELF file in which every kernel has a section ".text.NAME".
        arch: compute capability, 80 for 8.0; from 7.0 on an instruction has 16 bytes, before that 8, and every fourth
            is control information.
    """
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [_SECTION.unpack_from(cubin, table + i * size) for i in range(count)]
    text = sections[names][4]
    found = {}
    for section in sections:
        start = text + section[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = section[5] // 16 if arch >= 70 else section[5] // 32 * 3
    return dict(sorted(found.items()))


def over_budget(arch: int, counts: Mapping[str, int], budget: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return one line for every kernel that is larger than its budget, or has none, or is missing."""
    allowed = budget.get(str(arch), {})
    lines = [
        f"SM{arch} {name}: {count} instructions, {allowed.get(name, 'no budget')} allowed"
        for name, count in counts.items()
        if count > allowed.get(name, 0)
    ]
    return lines + [f"SM{arch} {name}: is missing" for name in allowed if name not in counts]


def read_budget() -> dict[str, dict[str, int]]:
    """Return the committed budget: instructions by compute capability and kernel."""
    budget: dict[str, dict[str, int]] = json.loads(BUDGET.read_text(encoding="utf-8"))
    return budget


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the budget anew")
    args = parser.parse_args(argv)
    try:
        counts = {arch: instructions(build_cubin(arch).read_bytes(), arch) for arch in ARCHITECTURES}
    except GlipError as error:
        print(f"budget.py: error: {error}", file=sys.stderr)
        return 1
    if args.write:
        new = {arch: {name: int(SLACK * count) for name, count in row.items()} for arch, row in counts.items()}
        write_atomically(BUDGET, json.dumps(new, indent=1) + "\n")
        return 0
    over = [line for arch, row in counts.items() for line in over_budget(arch, row, read_budget())]
    print("\n".join(over) or f"{sum(map(len, counts.values()))} kernels, all within their budgets")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
