"""StoryMem: multi-shot, minute-long video with a visual memory (arXiv 2512.19539).

Names are resolved when first used, so that ``import storymem`` loads neither torch nor diffusers.
"""

__version__ = "0.1.0"

_HOMES = {
    "generate": "storymem.film.generate",
    "Story": "storymem.story",
    "StoryError": "storymem.story",
    "Shot": "storymem.story",
    "load_story": "storymem.story",
    "Film": "storymem.film.folder",
    "Storyteller": "storymem.film.storyteller",
    "Keyframe": "storymem.memory",
    "KeyframeSelector": "storymem.memory",
    "MemoryBank": "storymem.memory",
    "WanMemoryToVideoPipeline": "storymem.wan.pipeline",
    "WanEulerScheduler": "storymem.wan.schedule",
    "WanUniPCScheduler": "storymem.wan.schedule",
    "load_memory_lora": "storymem.wan.lora",
}

__all__ = sorted(_HOMES)

# To load a saved WanUniPCScheduler, diffusers looks for its base class in the module that holds it.
_FOR_DIFFUSERS = {"SchedulerMixin": "diffusers"}


def __getattr__(name: str) -> object:
    from importlib import import_module

    home = _HOMES.get(name) or _FOR_DIFFUSERS.get(name)
    if home is None:
        raise AttributeError(f"module 'storymem' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
