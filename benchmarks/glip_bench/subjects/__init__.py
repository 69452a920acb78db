"""What is measured: each form of GLIP, and the detectors beside it, behind one protocol (`base.Subject`)."""
