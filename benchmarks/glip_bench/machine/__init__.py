"""What it is measured on: processor, GPUs, versions."""
