"""How it is measured: rounds in turn, sweeps, frame rates, memory."""
