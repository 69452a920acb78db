"""Checkpoint to bundle: the model in plain torch, the ONNX graphs, the parity report."""
