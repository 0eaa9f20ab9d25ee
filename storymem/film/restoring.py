"""The memory of a film for a run: that of the chosen takes as the user left it, with the story's references of now."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from storymem.film.differences import flat
from storymem.film.matching import arranged
from storymem.film.resume import Reference, Run, encoders, references
from storymem.media.images import read_image
from storymem.memory import EmbedFrames, Keyframe, MemoryBank, RecallPolicy, ids_on_disk, reference_id
from storymem.memory.bank import FitImage, holds_image, keyframe_files, read_entries
from storymem.memory.keyframes import image_hash

logger = logging.getLogger(__name__)


def restored_memory(run: Run, *, policy: RecallPolicy, embed: EmbedFrames, fit: FitImage) -> MemoryBank:
    """The memory with which a run begins; nothing is written.

    ``embed`` embeds images that were added or changed, and ``fit`` brings them to the size of the shots.
    """
    film, made_with = run.film, encoders(run.config)
    was = [] if film.before is None else film.before.slots
    if film.lacks_memory:
        logger.warning(f"memory: {film.folder / 'memory.json'} is missing: it is written again from the takes")
        was = []
    entries = arranged(film, was, read_entries(film.folder) or ())
    saved = MemoryBank.load(film.folder, entries=entries, embed=embed, fit=fit, made_with=made_with)
    if film.memory_changed:
        logger.warning(f"memory: {film.folder / 'memory.json'} was changed since it was written; it is used as it is")
    added = {entry.id for entry in entries if entry.sha256 is None and entry.image == keyframe_files(entry.id)[0]}
    for id, done in saved.edited.items():
        if id not in added:  # by `storymem memory`, which has printed it
            logger.warning(f"memory: {done}; it becomes keyframe {id}")
    used, on_disk = {keyframe.id for keyframe in saved}, ids_on_disk(film.folder)

    def read(path: Path, reference: Reference, shot: int | None) -> Keyframe:
        image = fit(read_image(path))
        # An image that an earlier memory of the film held keeps its id, by which takes name what they recalled.
        files = {id: film.folder / keyframe_files(id)[0] for id in on_disk if id.startswith("ref_")}
        others = {id for id in on_disk if id not in files or not holds_image(files[id], image_hash(image))}
        id = reference_id(reference.character or path.stem, used | others)
        used.add(id)
        origin = {"shot": shot, "source": reference.source, "character": reference.character}
        return Keyframe(id=id, image=image, embedding=embed(image[None])[0], **origin)  # type: ignore[arg-type]

    bank = MemoryBank(_with_references(run, list(saved), read), policy=policy, made_with=made_with)
    recalled = {id for take in film.takes for id in take.memory}
    waiting = {keyframe.id: "" for keyframe in bank if keyframe.is_users and keyframe.id not in recalled}
    bank.edited = waiting | {id: done for id, done in saved.edited.items() if id in bank}
    return bank


def _with_references(run: Run, keyframes: list[Keyframe], read: Any) -> list[Keyframe]:
    """``keyframes`` with the references of the story's characters and shots.

    Those that the story no longer names leave; those whose image, size or fit has changed are read again; new ones
    follow the last, or come before the frames of their shot. Those that the user deleted from the memory stay away.
    """
    film, before = run.film, run.film.before
    size, old_size = (
        [flat(one).get(key) for key in ("model.video.height", "model.video.width", "memory.reference_fit")]
        for one in (run.config, {} if before is None else before.config)
    )
    old = set() if before is None or not film.has_memory else set(references(before.story, before.slots))
    if film.is_older:  # which did not add the references of a shot before that was made
        old = {one for one in old if one.folder is None or any(take.folder == one.folder for take in film.takes)}
    paths = dict(zip(references(film.story, film.slots), run.story.all_references, strict=True))
    number = {slot.folder: number for number, slot in enumerate(film.slots, start=1)}
    unread = [reference for reference in paths if reference not in old]
    found: list[Keyframe] = []
    end = 0
    for keyframe in keyframes:
        if keyframe.frame is None and not keyframe.is_users:
            folder = None if keyframe.shot is None else film.slots[keyframe.shot - 1].folder
            of = (keyframe.source, keyframe.character, folder)
            reference = next((one for one in paths if (one.source, one.character, one.folder) == of), None)
            if reference is None:
                continue
            if size != old_size or reference in unread:
                keyframe = replace(read(paths[reference], reference, keyframe.shot), pinned=keyframe.pinned)
                unread = [one for one in unread if one != reference]
            end = len(found) + 1 if folder is None else end
        found.append(keyframe)
    for one in unread:
        shot = None if one.folder is None else number[one.folder]
        place, end = (end, end + 1) if shot is None else (_before_frames(found, shot), end)
        found.insert(place, read(paths[one], one, shot))
    return found


def _before_frames(keyframes: Sequence[Keyframe], shot: int) -> int:
    """Where an image for ``shot`` stands: before its frames, and before all of later shots."""
    later = (n for n, k in enumerate(keyframes) if k.shot is not None and (k.shot, k.frame or 0) > (shot, 0))
    return next(later, len(keyframes))
