"""What experiments run on: TFDS builders, the sources that read them, and per-example views."""
