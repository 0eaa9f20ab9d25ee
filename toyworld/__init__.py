"""The drawn world of the embedded models, its reader, and the training recipe of those models."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
