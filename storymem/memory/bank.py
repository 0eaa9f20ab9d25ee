"""The memory bank of one film: all its keyframes, oldest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from storymem.memory.keyframes import EmbedFrames, Keyframe
from storymem.memory.recall import RecallPolicy, ShotToCome, SinkAndRecent
from storymem.memory.storage import read_keyframes, write_keyframes


class MemoryBank:
    """Keyframes in the order in which they were added.

    The bank itself forgets nothing but what :meth:`forget_from` says: its capacity is the recall policy's, so
    that a film can be taken up again at any earlier shot. A new keyframe is compared with the whole bank, not
    only with what is still recalled.

    Args:
        keyframes: the first content.
        policy: which keyframes a shot sees; sink and recent by default.
    """

    def __init__(self, keyframes: Iterable[Keyframe] = (), *, policy: RecallPolicy | None = None) -> None:
        self.policy: RecallPolicy = policy if policy is not None else SinkAndRecent()
        self._keyframes: dict[str, Keyframe] = {}
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
        """Drop what shot ``shot`` (counted from 0) and all later ones added. References of the story stay."""
        self._keyframes = {k.id: k for k in self if k.shot is None or k.shot < shot}

    def recall(self, shot: ShotToCome | None = None) -> list[Keyframe]:
        """What the next shot sees, oldest first: a pure function of the bank's content and of that shot."""
        return self.policy.recall(list(self), shot)

    def save(self, folder: str | Path) -> None:
        """Write ``memory.json`` and ``keyframes/`` in ``folder``; see :mod:`storymem.memory.storage`."""
        write_keyframes(Path(folder), list(self))

    @classmethod
    def load(
        cls, folder: str | Path, *, embed: EmbedFrames | None = None, policy: RecallPolicy | None = None
    ) -> MemoryBank:
        """Read what :meth:`save` wrote, hand-edited or not; see :mod:`storymem.memory.storage`.

        Args:
            folder: the film's folder.
            embed: embeds pictures that were added or replaced by hand; without it they are an error.
            policy: as in the constructor.

        Raises:
            ValueError: naming the file that is missing, corrupt or not understood.
        """
        return cls(read_keyframes(Path(folder), embed), policy=policy)
