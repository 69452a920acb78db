"""The honest numbers, and their recorded results."""
