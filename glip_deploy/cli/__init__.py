"""The command line of the runtime: `glip-detect`, and what all commands of the toolkit share."""
