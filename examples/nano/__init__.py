"""GLIP-nano: a small GLIP, trained on scenes generated here."""
