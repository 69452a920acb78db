"""Write a full-size GLIP checkpoint with synthetic weights, in the official file format.

    python examples/stand_in/make_checkpoint.py T glip_t.pth

Released weights cannot travel with this repository. These stand in for them: the same keys, shapes, dtypes and cost,
the same arithmetic, the same values on every machine. What the model then detects is arbitrary.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from glip_deploy.files import atomic_file

HERE = Path(__file__).resolve().parent
VARIANTS = ("A", "B", "T", "L", "T_prompt", "L_no_fusion")
"""L_no_fusion was never released: GLIP-L without its fusion and BERT layers, a row of the paper's speed table."""

_TOWER = re.compile(r"(rpn\.head\.dyhead_tower\.)(\d+)\.")


def without_fusion(key: str) -> str | None:
    """A key of GLIP-L in the form without deep fusion; None for one that this form lacks."""
    found = _TOWER.match(key)
    if found is None:
        return key
    block, kind = divmod(int(found[2]), 3)  # fusion, BERT layer, DyConv, fusion, ...
    return f"{found[1]}{block}.{key[found.end() :]}" if kind == 2 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("output", type=Path)
    parser.add_argument("--salt", default="", help="another set of weights")
    args = parser.parse_args()

    import torch

    sys.path.insert(0, str(HERE))
    from synth_weights import items

    released = args.variant.removesuffix("_no_fusion")
    state = {}
    for key, value in items(str(HERE / "manifests" / f"glip_{released}.json"), args.salt):
        name = key if released == args.variant else without_fusion(key)
        if name is not None:
            state[name] = torch.from_numpy(value)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(args.output) as partial:
        torch.save({"model": state}, partial)
    print(f"{args.output}: stand-in GLIP-{args.variant}, {sum(v.numel() for v in state.values()) / 1e6:.0f} M numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
