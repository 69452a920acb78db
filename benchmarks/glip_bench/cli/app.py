"""glip-bench: how fast, how much memory, and where the time goes, on the machine at hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from glip_deploy.errors import GlipError

__all__ = ["main"]

EXAMPLES = """\
examples:
  glip-bench --quick
  glip-bench --model glip_t/ --checkpoint glip_t.pth --runs 20 --json result.json
  glip-bench --model glip_t/ --frames video.mp4 --frame 1920x1080 --frame-rate 30
  glip-bench --model glip_t/ --json new.json --compare old.json
  glip-bench --compare old.json new.json
  glip-bench --model glip_t/ --sweep tokens=8,16,32,64,128,256 --report report/
  glip-bench --model glip_t/ --floor A100
  glip-bench --table paper
  glip-bench --model glip_t/ --accuracy instances_val2017.json --images val2017/ --json accuracy.json
exit status: 0 done, 1 an error, 2 bad usage, 3 slower than --compare's old result, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status (see EXAMPLES)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.compare is not None and len(args.compare) > 2:
        parser.error("--compare takes one result (held against this run) or two")
    try:
        from glip_bench.cli.commands import dispatch

        text, status = dispatch(args, (lambda step: None) if args.quiet else _step)
    except GlipError as error:
        print(f"glip-bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"glip-bench: interrupted, {_kept(args)}", file=sys.stderr)
        return 130
    print(text)
    return status


def _kept(args: argparse.Namespace) -> str:
    """What an interrupted run leaves."""
    if args.json is not None and (args.accuracy is not None or args.grounding is not None):
        return f"what was found is kept beside {args.json}, --resume goes on"
    if args.json is not None and args.json.is_file() and args.floor is None:
        return f"what was measured is in {args.json}, --resume goes on"
    return "nothing was written"


def _step(name: str) -> None:
    print(f"[{name}]", file=sys.stderr, flush=True)


def _size(text: str) -> tuple[int, int]:
    """Read "1920x1080" as (height, width)."""
    width, cross, height = text.lower().partition("x")
    if not cross or not (width.isdecimal() and height.isdecimal()) or not (int(width) and int(height)):
        raise argparse.ArgumentTypeError(f'"{text}" is not a size; write width x height in pixels, as in 1920x1080')
    return int(height), int(width)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is not a whole number of 1 or more')
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of frames a second, above 0 and up to 1000')
    return value


def _score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is not a score; write a number from 0 to below 1')
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glip-bench",
        description="Time detection with GLIP in each form that can run here, piece by piece, and say what it was"
        " measured on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument("--model", type=Path, metavar="DIR", help="bundle that glip-export wrote")
    what.add_argument("--checkpoint", type=Path, metavar="FILE", help="the .pth it was exported from (torch subjects)")
    what.add_argument(
        "--subjects", metavar="A,B", help="which, in this order (default: all that can run); others are held against A"
    )
    what.add_argument(
        "--yardsticks", action="store_true", help="other detectors too, of real size with random weights (transformers)"
    )
    what.add_argument(
        "--frames", "--picture", metavar="SOURCE", help="picture, folder, glob or video (default: our photograph)"
    )
    what.add_argument("--frame", type=_size, default=(960, 1600), metavar="WxH", help="frame size (1600x960)")
    what.add_argument("--prompt", metavar="TEXT", help="what to look for (default: five classes, 14 tokens)")
    what.add_argument("--threshold", type=_score, default=0.5, metavar="SCORE", help="of a box that counts (0.5)")
    what.add_argument("--shortest-side", type=_count, metavar="PIXELS", help="network size (800; 320 with --quick)")
    what.add_argument("--longest-side", type=int, default=1333, metavar="PIXELS", help="its limit (1333), 0 for none")
    how = parser.add_argument_group("how")
    how.add_argument("--runs", type=_count, metavar="N", help="timed frames of each subject (7)")
    how.add_argument("--quick", action="store_true", help="under a minute on two cores; finds a bundle under build/")
    how.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: one a core)")
    how.add_argument("--frame-rate", type=_rate, metavar="FPS", help="also: latency and drops with such a camera")
    how.add_argument("--no-memory", action="store_true", help="leave out peak memory (a fresh process a subject)")
    how.add_argument("--no-details", action="store_true", help="leave out blocks of the network, prompts, resizing")
    other = parser.add_argument_group("other questions")
    other.add_argument(
        "--accuracy", type=Path, metavar="JSON", help="COCO-format annotations: average precision, no times"
    )
    other.add_argument(
        "--grounding", type=Path, metavar="JSON", help="captions with phrases: recall@1, 5, 10, no times"
    )
    other.add_argument("--images", type=Path, metavar="DIR", help="their pictures")
    other.add_argument("--limit", type=_count, metavar="N", help="the first N pictures only")
    other.add_argument("--classes-per-prompt", type=_count, metavar="N", help="at most (default: as many as fit)")
    other.add_argument("--table", choices=("paper",), help="time nothing; the paper's figures beside the measured ones")
    other.add_argument("--results", type=Path, metavar="DIR", help="result files for --table (benchmarks/results)")
    other.add_argument("--floor", metavar="NAME", help="time nothing; what a GPU, or the cpu at hand, could do at best")
    how.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="AXIS=A,B",
        help="also at these tokens, classes, side or batch, or with these bundles; may be given several times",
    )
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE", help="also write the result, after every round")
    out.add_argument("--resume", action="store_true", help="go on with the interrupted run in --json's file")
    out.add_argument("--report", type=Path, metavar="DIR", help="also write report.md with plots")
    out.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar=("OLD", "NEW"),
        help="hold this run against an old result, or two results against each other; exit status 3 if worse",
    )
    out.add_argument("--quiet", action="store_true", help="only the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
