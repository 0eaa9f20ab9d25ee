"""The visual memory: which frames of a shot are kept, where, and which of them the next shot sees."""

from storymem.memory.bank import MemoryBank
from storymem.memory.keyframes import EmbedFrames, Keyframe, embed_in_batches, reference_id
from storymem.memory.recall import CharacterFirst, RecallPolicy, SinkAndRecent
from storymem.memory.selection import KeyframeSelector, Selection, SelectionPolicy, UniformSelector
from storymem.memory.storage import ids_on_disk, keyframe_files

__all__ = [
    "CharacterFirst",
    "EmbedFrames",
    "Keyframe",
    "KeyframeSelector",
    "MemoryBank",
    "RecallPolicy",
    "Selection",
    "SelectionPolicy",
    "SinkAndRecent",
    "UniformSelector",
    "embed_in_batches",
    "ids_on_disk",
    "keyframe_files",
    "reference_id",
]
