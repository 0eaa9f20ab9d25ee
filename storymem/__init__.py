"""StoryMem: multi-shot, minute-long video with a visual memory (arXiv 2512.19539).

Names are resolved when first used, so that ``import storymem`` loads neither torch nor diffusers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Story": "storymem.story",
    "StoryError": "storymem.story",
    "load_story": "storymem.story",
    "Film": "storymem.film",
    "Storyteller": "storymem.storyteller",
    "Keyframe": "storymem.memory",
    "KeyframeSelector": "storymem.memory",
    "MemoryBank": "storymem.memory",
    "WanMemoryToVideoPipeline": "storymem.wan.pipeline",
    "WanUniPCScheduler": "storymem.wan.schedule",
    "load_memory_lora": "storymem.wan.lora",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'storymem' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
