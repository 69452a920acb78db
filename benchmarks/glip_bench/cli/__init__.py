"""The command line: `glip-bench` and its options."""

from glip_bench.cli.app import main

__all__ = ["main"]
