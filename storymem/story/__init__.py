"""Stories: their parts, and reading them from YAML or ST-Bench JSON. Loads no torch."""

from storymem.story.parser import STORY_SUFFIXES, StoryError
from storymem.story.schema import MAX_SHOTS, Character, Scene, Shot, Story, load_stories, load_story

__all__ = [
    "MAX_SHOTS",
    "STORY_SUFFIXES",
    "Character",
    "Scene",
    "Shot",
    "Story",
    "StoryError",
    "load_stories",
    "load_story",
]
