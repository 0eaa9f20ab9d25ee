"""The memory bank of one film: all its keyframes, oldest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from storymem.memory.keyframes import EmbedFrames, Keyframe
from storymem.memory.recall import RecallPolicy, ShotToCome, SinkAndRecent
from storymem.memory.storage import (
    MANIFEST,
    FitImage,
    Reading,
    keyframe_files,
    read_entries,
    read_keyframes,
    remove_keyframes,
    write_keyframes,
)


class MemoryBank:
    """Keyframes in the order in which they were added.

    The bank itself forgets nothing but what :meth:`forget_from` says: its capacity is the recall policy's, so
    that a film can be taken up again at any earlier shot. A new keyframe is compared with the whole bank, not
    only with what is still recalled.

    Args:
        keyframes: the first content.
        policy: which keyframes a shot sees; sink and recent by default.
        made_with: what tells the settings of embeddings and latents from others; saved with them.

    Attributes:
        by_hand: of a bank that was loaded, keyframes that a person has added or replaced since it was saved:
            id -> what was done.
    """

    def __init__(
        self, keyframes: Iterable[Keyframe] = (), *, policy: RecallPolicy | None = None, made_with: str | None = None
    ) -> None:
        self.policy: RecallPolicy = policy if policy is not None else SinkAndRecent()
        self.made_with = made_with
        self.by_hand: dict[str, str] = {}
        self._keyframes: dict[str, Keyframe] = {}
        self._written: dict[Path, dict[str, Keyframe]] = {}  # what was saved, and is not written again
        self.remember(keyframes)

    def __len__(self) -> int:
        return len(self._keyframes)

    def __iter__(self) -> Iterator[Keyframe]:
        return iter(self._keyframes.values())

    def __contains__(self, id: object) -> bool:
        return id in self._keyframes

    def __getitem__(self, id: str) -> Keyframe:
        return self._keyframes[id]

    @property
    def embeddings(self) -> np.ndarray:
        """float32 [M, D] in the bank's order; [0, 0] while the bank is empty."""
        if not self._keyframes:
            return np.zeros((0, 0), dtype=np.float32)
        return np.stack([keyframe.embedding for keyframe in self])

    def remember(self, keyframes: Iterable[Keyframe]) -> None:
        """Add keyframes as the newest. ``ValueError`` for an id that the bank has already."""
        for keyframe in keyframes:
            if keyframe.id in self:
                raise ValueError(f"keyframe {keyframe.id} is in the memory already: forget it first")
            self._keyframes[keyframe.id] = keyframe

    def update(self, keyframe: Keyframe) -> None:
        """Put a keyframe in the place of the one with its id (once it has a latent, say). ``KeyError``."""
        if keyframe.id not in self:
            raise KeyError(keyframe.id)
        self._keyframes[keyframe.id] = keyframe

    def forget_from(self, shot: int) -> None:
        """Drop what shot ``shot`` (counted from 0) and all later ones added.

        References of the story and pictures that a person added stay.
        """
        self._keyframes = {k.id: k for k in self if k.shot is None or k.shot < shot or k.is_by_hand}

    def recall(self, shot: ShotToCome | None = None) -> list[Keyframe]:
        """What the next shot sees, oldest first: a pure function of the bank's content and of that shot."""
        return self.policy.recall(list(self), shot)

    def files(self) -> list[str]:
        """The files that the bank has once it is saved, relative to the film's folder, without the manifest."""
        return [name for id in self._keyframes for name in keyframe_files(id)]

    def save(self, folder: str | Path, *, manifest: str | None = None) -> None:
        """Write ``memory.json`` and ``keyframes/`` in ``folder``; see :mod:`storymem.memory.storage`.

        Files of keyframes that ``memory.json`` names and the bank no longer holds are deleted at the end.

        Args:
            folder: the film's folder.
            manifest: another name for ``memory.json``, which then stays as it is; nothing is deleted.
        """
        folder = Path(folder)
        forgotten = [] if manifest else [entry for entry in read_entries(folder) if entry["id"] not in self]
        written = self._written.setdefault(folder, {})
        write_keyframes(folder, list(self), written=written, manifest=manifest or MANIFEST, made_with=self.made_with)
        remove_keyframes(folder, forgotten)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        embed: EmbedFrames | None = None,
        policy: RecallPolicy | None = None,
        fit: FitImage | None = None,
        made_with: str | None = None,
        unmarked: str | None = None,
    ) -> MemoryBank:
        """Read what :meth:`save` wrote, hand-edited or not; see :mod:`storymem.memory.storage`.

        Args:
            folder: the film's folder.
            embed: embeds pictures that were added or replaced by hand; without it they are an error.
            policy: as in the constructor.
            fit: brings such pictures to the size of the shots.
            made_with: as in the constructor; what was made with other settings is embedded anew and loses its latent.
                None takes all as it is.
            unmarked: with what embeddings and latents were made that do not say it.

        Raises:
            ValueError: naming the file that is missing, corrupt or not understood.
        """
        reading = Reading(embed=embed, fit=fit, made_with=made_with, unmarked=unmarked)
        keyframes, by_hand = read_keyframes(Path(folder), reading)
        bank = cls(keyframes, policy=policy, made_with=made_with)
        bank.by_hand = by_hand
        return bank
