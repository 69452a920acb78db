"""What serving costs over `Detector.detect` in one process."""
