"""The memory of a film: which frames of a shot become keyframes, and which keyframes the next shot is given."""

from storymem.memory.bank import MemoryBank, ids_on_disk
from storymem.memory.keyframes import EmbedFrames, Keyframe, embed_in_batches, frame_id, reference_id
from storymem.memory.recall import ComingShot, Learned, RecallPolicy, Relevant, SinkAndRecent
from storymem.memory.selection import (
    Candidate,
    EvenlySpaced,
    KeyframeSelector,
    Selection,
    SelectionPolicy,
    UniformSelector,
)

__all__ = [
    "Candidate",
    "ComingShot",
    "EmbedFrames",
    "EvenlySpaced",
    "Keyframe",
    "KeyframeSelector",
    "Learned",
    "MemoryBank",
    "RecallPolicy",
    "Relevant",
    "Selection",
    "SelectionPolicy",
    "SinkAndRecent",
    "UniformSelector",
    "embed_in_batches",
    "frame_id",
    "ids_on_disk",
    "reference_id",
]
