"""What is done to a story's reference pictures before they are remembered."""

from __future__ import annotations

from storymem.media.images import Fit, fit_note, read_image_with_notes
from storymem.story import Story

_MOST = 20  # lines


def reference_remarks(story: Story, height: int, width: int, fit: Fit) -> list[str]:
    """What a person should know of the reference pictures before the story is filmed, a line each.

    Args:
        story: what is told; its pictures are there and can be read.
        height: of the film's frames.
        width: likewise.
        fit: how pictures are brought to that size.
    """
    paths = [*story.references, *(path for shot in story.shots for path in shot.references)]
    remarks = []
    for path, written in dict(zip(paths, story.written(paths), strict=True)).items():
        image, read = read_image_with_notes(path)
        notes, note = list(read), fit_note(image.shape[0], image.shape[1], height, width, fit)
        if note is not None:
            notes.append(f"{note} ({width}x{height}, memory.reference_fit={fit})")
        remarks += [f"reference {written} {one}" for one in notes]
    more = len(remarks) - _MOST
    return remarks[:_MOST] + ([f"{more} more remarks on references"] if more > 0 else [])
