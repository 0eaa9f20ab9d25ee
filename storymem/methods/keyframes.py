"""Systems that make one image for each shot first, and then each shot by image-to-video: what they share.

A :class:`KeyframeMethod` plans groups of images and makes them. The stage writes ``keyframe_images/01_02.png`` into the
film's folder, group by group, and frees the image model; then the shot loop makes every shot from its image by the base
model alone. A group on disk that was made from the same is reused.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from storymem.film.folder import Film
from storymem.film.generate import weight_hashes
from storymem.film.manifest import IMAGES, config_hash, unused_folder
from storymem.film.progress import Progress
from storymem.film.settings import Mode
from storymem.io import hash_json, replacing
from storymem.media.images import fit_image, read_image
from storymem.memory.keyframes import image_hash
from storymem.methods import check_all
from storymem.methods.baseline import IMAGE_TO_VIDEO_SHIFT, Baseline, WithoutMemory
from storymem.methods.image_models import ImageModel, WanImages
from storymem.story import Shot, Story
from storymem.wan.settings import ModelSettings

_RECIPE = "storymem"  # the text in a PNG that identifies what it was made from


@dataclass(frozen=True, kw_only=True)
class ImageGroup:
    """Images that are made together.

    Args:
        names: of the images, as :func:`image_names` gives them for shots.
        recipe: everything that they are made from besides the film's settings, in plain JSON types.
        needs: names of images of earlier groups that they are made from.
    """

    names: tuple[str, ...]
    recipe: Mapping[str, Any]
    needs: tuple[str, ...] = ()


def image_names(story: Story) -> list[str]:
    """A name for the image of each shot: ``01_02`` for scene 1, shot 2."""
    names: list[str] = []
    for shot in story.shots:
        names.append(unused_folder(shot.scene, shot.number, names))
    return names


@dataclass(frozen=True, kw_only=True)
class ImageToVideo(WithoutMemory):
    """Every shot from its image, which is its first frame.

    Args:
        method: makes the images.
    """

    method: KeyframeMethod

    def mode_of(self, shot: Shot, story: Story) -> Mode:
        """Image-to-video."""
        return "i2v"

    def texts_of(self, story: Story, shot: Shot) -> list[str]:
        return [self.method.motion_of(story, shot)]

    def before_shots(self, story: Story, film: Film, shots: Sequence[Shot], progress: Progress) -> None:
        """The images of all shots."""
        if not Film.exists(film.folder):
            film.save()  # else the folder would not be that of a film, should the process be killed now
        video = self.generator.video
        size = {"height": video.height, "width": video.width}
        make_images(self.method, story, film.folder, **size, settings=self.config, progress=progress)

    def given(self, story: Story, shot: Shot, film: Film) -> np.ndarray:
        """The shot's image, uint8 [1, H, W, 3]."""
        video, name = self.generator.video, image_names(story)[shot.index]
        return fit_image(read_image(film.folder / IMAGES / f"{name}.png"), video.height, video.width, "cover")[None]


class KeyframeMethod(Baseline):
    """Images for all shots, then image-to-video; ``cut: false`` makes no difference.

    Args:
        generate: as of :class:`storymem.methods.storymem.StoryMem`.
        images: settings of the images, for the film's record.
    """

    loop = ImageToVideo

    def __init__(self, *, generate: Mapping[str, Any], images: Mapping[str, Any]) -> None:
        super().__init__(generate={**generate, "continuity": "none"}, shift=IMAGE_TO_VIDEO_SHIFT)
        self.config["images"] = dict(images)

    @cached_property
    @abstractmethod
    def painter(self) -> ImageModel | WanImages:
        """What makes the images."""

    @abstractmethod
    def plan(self, story: Story, folder: Path) -> Sequence[ImageGroup]:
        """The groups, in the order in which they are made; each shot has an image in one of them.

        Args:
            story: of the film.
            folder: the film's folder, for what is planned once and saved with the film.
        """

    @abstractmethod
    def make(self, group: ImageGroup, given: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The images of a group, uint8 [H, W, 3] of any size; ``given`` are those that it needs, as they were saved."""

    def motion_of(self, story: Story, shot: Shot) -> str:
        """The text that a shot is made from, beside its image."""
        return story.prompt_of(shot)

    def parts(self, plain: Mapping[str, Any]) -> dict[str, Any]:
        """The weights of the image model are recorded too."""
        weights = plain["config"]["weights"] | weight_hashes(self.painter.weights)
        return {"method": self, "config": {**plain["config"], "weights": weights}}

    def uses_text_to_video(self, story: Story) -> bool:
        """Never: each shot has an image."""
        return False

    def check(self, story: Story) -> None:
        check_all(partial(super().check, story), self.painter.check)


def make_images(
    method: KeyframeMethod,
    story: Story,
    folder: Path,
    *,
    height: int,
    width: int,
    settings: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Make the images of ``story`` that ``folder/keyframe_images`` lacks or that were made from something else.

    An image that the user put there, which has no record of what it was made from, is used as it is.

    Args:
        method: makes them.
        story: of the film.
        folder: the film's folder, which is locked.
        height: of the images that are saved; what is larger is cropped, as ``cover`` of :func:`fit_image`.
        width: likewise.
        settings: of the film, in plain JSON types; images that were made with others are regenerated.
        progress: reports images.
    """
    place, recipes = folder / IMAGES, dict[str, str]()
    groups = method.plan(story, folder)
    total, done = sum(len(group.names) for group in groups), 0
    for group in groups:
        needs = [_digest(place, need, recipes) for need in group.needs]
        made_from = [config_hash(settings), group.recipe, height, width, needs]
        recipe = hash_json(json.loads(json.dumps(made_from)))[:16]
        recipes |= dict.fromkeys(group.names, recipe)
        missing = [name for name in group.names if not _is_made(place / f"{name}.png", recipe)]
        if missing and progress is not None:
            progress.print(f"images made: {done} of {total}; making {', '.join(group.names)}")
        done += len(group.names)
        if missing:
            images = method.make(group, {name: read_image(place / f"{name}.png") for name in group.needs})
            place.mkdir(exist_ok=True)
            for name in missing:
                _write(place / f"{name}.png", fit_image(images[name], height, width, "cover"), recipe)
    method.painter.free()


def _digest(place: Path, name: str, recipes: Mapping[str, str]) -> str:
    """What identifies an image that another is made from."""
    path = place / f"{name}.png"
    return image_hash(read_image(path)) if _recipe_of(path) is None else recipes[name]


def _is_made(path: Path, recipe: str) -> bool:
    return path.is_file() and _recipe_of(path) in (None, recipe)


def _recipe_of(path: Path) -> str | None:
    with Image.open(path) as image:
        return image.info.get(_RECIPE)


def _write(path: Path, image: np.ndarray, recipe: str) -> None:
    text = PngInfo()
    text.add_text(_RECIPE, recipe)
    with replacing(path) as partial:
        Image.fromarray(image).save(partial, format="PNG", pnginfo=text)


def is_embedded(model: ModelSettings) -> bool:
    """Whether a model's weights come with the package, or are random: then it also makes the images."""
    return model.weights is None or model.weights.source.startswith("package:")
