"""What a system denoises, as data: one sequence of latent frames made of segments.

Wan denoises the latent frames of one shot, and self-attention lets every token read all others. Systems for several
shots run the same network on more frames: keyframes of earlier shots, or further shots. They differ in four things
only, which a :class:`Segment` states for a run of frames:

- ``positions``: where each frame is on the temporal axis (RoPE);
- ``timestep``: how noisy the frames are, that of the step (t) or a fixed one (0: clean);
- ``reads``: which keys its queries read in self-attention;
- ``text``: what its queries read in cross-attention.

A :class:`Layout` is a sequence of segments; :mod:`storymem.wan.transformer` executes it. In the tables ``x`` means that
the queries of the row read the keys of the column. M memory frames, T latent frames of video, stride S.

Wan itself, ``single_shot``::

    segment   positions    timestep   text      reads: video
    video     0 .. T-1     t          prompt           x

StoryMem as published (arXiv 2512.19539, section 3.3), ``memory_joint``. The sequence begins with memory frames. They
are noise and are denoised with the video; their clean latents are in condition channels, and what is denoised of them
is dropped. The video keeps the positions that Wan was trained with, and memory has negative ones, S = 5 apart: to the
network it is frames from long before the shot::

    temporal positions:  -M*S, -(M-1)*S, ..., -S,  0, 1, ..., T-1

    M = 3, S = 5:        -15   -10   -5  |  0  1  2  ...  T-1
                             memory      |       video

    segment   positions    timestep   text      reads: memory   video
    memory    -M*S .. -S   t          prompt           x        x
    video     0 .. T-1     t          prompt           x        x

StoryMem with cached memory, ours, ``memory_cached``. Memory frames are clean, at timestep 0, and read nothing that
changes between steps. So their keys and values are the same in all steps (:attr:`Layout.constant`): they are computed
once a shot, and a step computes the video alone::

    segment   positions    timestep   text      reads: memory   video
    memory    -M*S .. -S   0          none             x
    video     0 .. T-1     t          prompt           x        x

A shot whose first n latent frames are given, for a base without condition channels (Wan2.2-TI2V-5B), ``with_given``::

    segment   positions    timestep   text      reads: given    video
    given     0 .. n-1     0          prompt           x        x
    video     n .. T-1     t          prompt           x        x

HoloCine (arXiv 2510.20822), ``holocine``: all shots of a film at once, each with its own caption. In its full variant
every shot reads all shots. In the sparse one, below, it reads all of itself and the first latent frame of every shot,
itself among them; that frame is read twice and counts twice::

    segment   positions                timestep   text                reads: shot 1       shot 2
    shot 1    0 .. T_1-1               t          global, caption 1          all, first   first
    shot 2    T_1 .. T_1+T_2-1         t          global, caption 2          first        all, first

LCT (arXiv 2503.10589), ``lct``: all shots of a film at once, each with its own text and, in training, its own timestep.
LCT itself puts every text before its video on the temporal axis; Wan's text has no positions, so a gap G is left::

    segment   positions                timestep   text                reads: shot 1       shot 2
    shot 1    0 .. T_1-1               t_1        scene, shot 1              x            x
    shot 2    T_1+G .. T_1+G+T_2-1     t_2        scene, shot 2              x            x

Memento (arXiv 2606.14667), ``memento``: an image of the subject is denoised beside the shot, from a caption of its own.
Memory frames are at the time in the film that they are from, and in each step they are the clean ones with that step's
noise. They read two key sets (1 and 2), with one attention for each, and take the mean. Subject and video do not read
each other: memory is all that passes between them::

    segment   positions    timestep   text              reads: subject   memory   video
    subject   -512         t          subject caption          x         x
    memory    film time    t          prompt                   1         1, 2     2
    video     0 .. T-1     t          prompt                             x        x
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

DEFAULT_STRIDE = 5


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Keys and values of the first ``frames`` latent frames of a segment."""

    segment: str
    frames: int


@dataclass(frozen=True, kw_only=True)
class Text:
    """Tokens of a text.

    Args:
        name: of the text among those given to a forward; a single text is "prompt".
        spans: token ranges [first, last + 1), in order and disjoint; None: all tokens, with padding, as in Wan.
    """

    name: str = "prompt"
    spans: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.spans is not None:
            ends = [end for span in self.spans for end in span]
            if not ends or ends != sorted(ends) or any(first == last for first, last in self.spans):
                raise ValueError(f"spans must be token ranges in order that do not overlap, not {self.spans}")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of latent frames.

    Args:
        name: unique in a layout.
        positions: temporal RoPE position of each latent frame; height and width are as in Wan.
        reads: key sets, each of names of segments or parts of segments. A query takes one softmax over all keys of a
            set; a segment named twice in a set counts twice. The results of several sets are averaged.
        text: what cross-attention reads; None: nothing, and cross-attention adds nothing.
        timestep: fixed, in 0..1000, such as 0 for clean latents; None: that of the step.
    """

    name: str
    positions: tuple[int, ...]
    reads: tuple[tuple[str | Keys, ...], ...]
    text: Text | None = Text()
    timestep: float | None = None

    @property
    def frames(self) -> int:
        """Latent frames."""
        return len(self.positions)

    @property
    def read_names(self) -> frozenset[str]:
        """Names of all segments it reads, wholly or in part."""
        return frozenset(name_of(keys) for key_set in self.reads for keys in key_set)


@dataclass(frozen=True)
class Layout:
    """A sequence of segments, in the order of their latent frames; hashable.

    Raises:
        ValueError: for duplicate names, names that are read and absent, or parts longer than their segment.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        frames = {segment.name: segment.frames for segment in self.segments}
        if len(frames) < len(self.segments):
            raise ValueError("segments of a layout must have different names")
        for segment in self.segments:
            if not segment.reads or not all(segment.reads):
                raise ValueError(f"segment {segment.name} has no keys to read")
            for keys in (keys for key_set in segment.reads for keys in key_set):
                if name_of(keys) not in frames:
                    raise ValueError(f"segment {segment.name} reads {name_of(keys)}, which the layout does not have")
                if isinstance(keys, Keys) and not 0 < keys.frames <= frames[keys.segment]:
                    raise ValueError(f"{keys.segment} has {frames[keys.segment]} frames, not {keys.frames}")

    @property
    def frames(self) -> int:
        """Latent frames of all segments."""
        return sum(segment.frames for segment in self.segments)

    @cached_property
    def constant(self) -> frozenset[str]:
        """Names of segments whose keys and values are the same at every step and for every text.

        Their timestep is fixed, they read no text, and they read only each other.
        """
        names = frozenset(s.name for s in self.segments if s.timestep is not None and s.text is None)
        while names != (
            closed := frozenset(s.name for s in self.segments if s.name in names and s.read_names <= names)
        ):
            names = closed
        return names

    def only(self, names: Iterable[str]) -> Layout:
        """The layout of these segments, which must read only each other."""
        return Layout(tuple(segment for segment in self.segments if segment.name in set(names)))

    def span(self, name: str) -> slice:
        """The latent frames of a segment."""
        start = 0
        for segment in self.segments:
            if segment.name == name:
                return slice(start, start + segment.frames)
            start += segment.frames
        raise KeyError(name)


def name_of(keys: str | Keys) -> str:
    """The name of the segment that is read, wholly or in part."""
    return keys if isinstance(keys, str) else keys.segment


def memory_positions(frames: int, stride: int = DEFAULT_STRIDE) -> tuple[int, ...]:
    """(-M*S, ..., -2S, -S): the negative temporal positions of M memory frames (section 3.3).

    Args:
        frames: M.
        stride: S; 5 for the published adapters, although the first public release ran with 1.
    """
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"the RoPE stride of the memory must be a whole number, 1 or more, not {stride}")
    return tuple(-stride * k for k in range(frames, 0, -1))


def single_shot(frames: int) -> Layout:
    """Wan's own sequence: ``frames`` latent frames of video."""
    return Layout((Segment(name="video", positions=tuple(range(frames)), reads=(("video",),)),))


def memory_joint(memory: int, video: int, stride: int = DEFAULT_STRIDE) -> Layout:
    """StoryMem as published: ``memory`` frames are denoised with ``video`` latent frames."""
    everything = (("memory", "video"),)
    before = Segment(name="memory", positions=memory_positions(memory, stride), reads=everything)
    shot = Segment(name="video", positions=tuple(range(video)), reads=everything)
    return Layout((before, shot)) if memory else single_shot(video)


def memory_cached(memory: int, video: int, stride: int = DEFAULT_STRIDE) -> Layout:
    """``memory`` clean frames at timestep 0, which read only each other, before ``video`` latent frames."""
    positions = memory_positions(memory, stride)
    before = Segment(name="memory", positions=positions, reads=(("memory",),), text=None, timestep=0)
    shot = Segment(name="video", positions=tuple(range(video)), reads=(("memory", "video"),))
    return Layout((before, shot)) if memory else single_shot(video)


def with_given(layout: Layout, frames: int) -> Layout:
    """``layout`` with the first ``frames`` latent frames of its segment "video" clean, as for Wan2.2-TI2V-5B."""
    if frames == 0:
        return layout
    span = layout.span("video")
    if frames >= span.stop - span.start:
        raise ValueError(f"{frames} given frames leave none of {span.stop - span.start} to denoise")
    segments = []
    for segment in layout.segments:
        reads = tuple(_with_part(key_set, "video", "given") for key_set in segment.reads)
        if segment.name == "video":
            segments.append(
                replace(segment, name="given", positions=segment.positions[:frames], reads=reads, timestep=0)
            )
            segment = replace(segment, positions=segment.positions[frames:])
        segments.append(replace(segment, reads=reads))
    return Layout(tuple(segments))


def _with_part(key_set: tuple[str | Keys, ...], whole: str, part: str) -> tuple[str | Keys, ...]:
    return tuple(name for keys in key_set for name in ((part, whole) if keys == whole else (keys,)))


def scene_and_own_text(shots: int, length: int) -> list[Text]:
    """What each shot reads of one text: that of the scene and its own.

    Args:
        shots: how many there are.
        length: tokens of each part of the text: first the scene, then each shot.
    """
    return [Text(spans=((0, length), (k * length, (k + 1) * length))) for k in range(1, shots + 1)]


def holocine(shots: Sequence[int], texts: Sequence[Text], *, sparse: bool) -> Layout:
    """HoloCine (arXiv 2510.20822): all shots of a film at once, one segment each.

    Args:
        shots: latent frames of each shot.
        texts: tokens that each shot reads: those of the global caption, of its own, and padding.
        sparse: whether a shot reads only the first latent frame of the others.
    """
    names = [f"shot{number}" for number in range(1, len(shots) + 1)]
    summaries = tuple(Keys(segment=name, frames=1) for name in names)
    starts = [sum(shots[:i]) for i in range(len(shots))]
    return Layout(
        tuple(
            Segment(
                name=name,
                positions=tuple(range(start, start + frames)),
                reads=((name, *summaries) if sparse else tuple(names),),
                text=text,
            )
            for name, start, frames, text in zip(names, starts, shots, texts, strict=True)
        )
    )


def lct(shots: Sequence[int], texts: Sequence[Text], *, gap: int = DEFAULT_STRIDE) -> Layout:
    """LCT (arXiv 2503.10589) for a network that cross-attends to text, as Wan does.

    LCT has no public code: positions follow its section 3 as far as cross-attended text permits. Pass ``timestep``
    [B, shots] to the forward for a timestep of each shot, as in training.

    Args:
        shots: latent frames of each shot.
        texts: what each shot reads: the scene and its own prompt.
        gap: G, temporal positions left free before every shot but the first, where LCT places its text.
    """
    if gap < 0:
        raise ValueError(f"the gap between shots must be 0 or more, not {gap}")
    names = tuple(f"shot{number}" for number in range(1, len(shots) + 1))
    starts = [sum(shots[:i]) + i * gap for i in range(len(shots))]
    return Layout(
        tuple(
            Segment(name=name, positions=tuple(range(start, start + frames)), reads=(names,), text=text)
            for name, start, frames, text in zip(names, starts, shots, texts, strict=True)
        )
    )


def memento(
    memory: Sequence[int], video: int, *, subject: bool = True, split: bool = True, cached: bool = False
) -> Layout:
    """Memento (arXiv 2606.14667).

    Args:
        memory: film-time positions of the memory frames, before 0.
        video: latent frames of the shot.
        subject: whether an image of the subject is denoised too.
        split: without a subject: whether memory takes the mean of {memory} and {memory, video}, as in training;
            released inference does not.
        cached: not the published layout: memory is clean and reads only itself, as in :func:`memory_cached`, and comes
            first. Then nothing of the subject reaches the video, so only training has one.
    """
    image = Segment(name="subject", positions=(-512,), reads=(("subject", "memory"),), text=Text(name="subject"))
    shot = Segment(name="video", positions=tuple(range(video)), reads=(("memory", "video"),))
    if cached:
        clean = Segment(name="memory", positions=tuple(memory), reads=(("memory",),), text=None, timestep=0)
        return Layout((clean, image, shot) if subject else (clean, shot))
    apart = (("subject", "memory"),) if subject else (("memory",),) if split else ()
    inner = (*apart, ("memory", "video"))
    noisy = Segment(name="memory", positions=tuple(memory), reads=inner)
    return Layout((image, noisy, shot) if subject else (noisy, shot))
