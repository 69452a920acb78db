"""Train GLIP-nano on generated scenes.

    python examples/nano/train.py --minutes 90

Run the same command again to continue after an interruption, a full disk or the end of the minutes; the result is the
same as without it. Uses a GPU where torch finds one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glip_deploy.cli.app import run_main

DEFAULT_WORK = Path("build/nano")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    args = _parser().parse_args(argv)
    return run_main(lambda: _train(args), "train.py", extra="export")


def _train(args: argparse.Namespace) -> int:
    import torch

    from nano.model import save_checkpoint
    from nano.objects import pictogram
    from nano.scenes import photographs
    from nano.training import Plan, Trainer, load_for_start, write_record

    pictogram("red apple"), photographs(fresh=False)  # what is missing is reported before the long part
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    default = Plan()
    plan = replace(
        default,
        seed=args.seed,
        batch=args.batch,
        backbone_steps=0 if args.init else args.backbone_steps,
        steps=args.steps,
        rate=args.rate,
    )
    args.work.mkdir(parents=True, exist_ok=True)
    state = args.work / "state.pt"
    trainer = Trainer(plan, device)
    if state.is_file():
        trainer.load(state)
        print(f"continuing at step {trainer.step} of {plan.total}", flush=True)
    elif args.init:
        load_for_start(trainer.model, args.init)
    started = time.monotonic()

    def log(line: str) -> None:
        print(f"[{(time.monotonic() - started) / 60:6.1f} min] {line}", flush=True)

    outcome = trainer.run(
        seconds=args.minutes * 60 if args.minutes else float("inf"), workers=args.workers, state=state, log=log
    )
    save_checkpoint(args.output, trainer.averaged_state(), trainer.vocabulary)
    write_record(args.work / "training.json", trainer, str(device))
    print(f"{outcome} at step {trainer.step} of {plan.total} after {trainer.seconds / 60:.0f} min of training in all")
    print(args.output)
    return 130 if outcome == "interrupted" else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, metavar="M", help="stop this leg after so long (default: no limit)")
    parser.add_argument("--backbone-steps", type=int, default=2000, help="steps of stage 1 (default 2000)")
    parser.add_argument("--steps", type=int, default=2800, help="steps of stage 2 (default 2800)")
    parser.add_argument("--batch", type=int, default=8, help="scenes a step (default 8)")
    parser.add_argument("--rate", type=float, default=1e-3, help="stage 2's highest learning rate (default 1e-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, metavar="PTH", help="start from a finished glip_nano.pth, skip stage 1")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one a core)")
    parser.add_argument("--workers", type=int, default=1, help="processes that make scenes (default 1)")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="where the run's state is kept (build/nano)")
    parser.add_argument("--output", type=Path, default=DEFAULT_WORK / "glip_nano.pth", help="the checkpoint to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
