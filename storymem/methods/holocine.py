"""HoloCine (arXiv 2510.20822): all shots in one denoising, each with its own part of the prompt.

The rules are those of the published code. Where it silently drops the windows of the text (no global caption, a prompt
that is truncated), an error is raised here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean
from pydantic.dataclasses import dataclass as checked_dataclass

from storymem.config import STRICT, build_settings
from storymem.methods.joint import FilmRequest, JointMethod
from storymem.story import Story
from storymem.story.captions import renamed
from storymem.wan.segments import Text, holocine
from storymem.wan.settings import GgufSettings, SamplerSettings, VideoSettings
from storymem.wan.texts import TextReader

GLOBAL, PER_SHOT, CUT = "[global caption]", "[per shot caption]", "[shot cut]"
_STRIDE = 4  # video frames of a latent frame

Range = tuple[int, int]


# Cuts


def fit(frames: float) -> int:
    """The number of the form 4n + 1 that the published code takes for ``frames``; of two equally near, n is even."""
    return _STRIDE * round((frames - 1) / _STRIDE) + 1


@dataclass(frozen=True)
class FilmPlan:
    """Where a film is cut.

    Args:
        frames: of the film, 4n + 1.
        cuts: first frame (from 0) of every shot but the first.
    """

    frames: int
    cuts: tuple[int, ...]

    @property
    def shots(self) -> tuple[int, ...]:
        """Frames of each shot."""
        return tuple(end - start for start, end in pairwise((0, *self.cuts, self.frames)))

    @property
    def shot_index(self) -> tuple[int, ...]:
        """The shot, from 0, of each latent frame."""
        starts = [(cut - 1) // _STRIDE + 1 for cut in self.cuts]
        return tuple(sum(start <= frame for start in starts) for frame in range((self.frames - 1) // _STRIDE + 1))

    @property
    def latent_frames(self) -> tuple[int, ...]:
        """Latent frames of each shot; a cut is always between two."""
        return tuple(Counter(self.shot_index).values())


def plan_film(shots: int, frames: int, cuts: Sequence[int] | None = None) -> FilmPlan:
    """The film of ``frames`` frames and its cuts, as the published code rounds them.

    Args:
        shots: how many captions there are.
        frames: asked for.
        cuts: asked for, first frames of shots; None: shots of equal length. Cuts that fall together or outside the film
            are dropped, so that the film may have fewer shots.
    """
    frames = fit(frames)
    wanted = [round(i * frames / shots) for i in range(1, shots)] if cuts is None else cuts
    return FilmPlan(frames, tuple(sorted({cut for cut in map(fit, wanted) if 0 < cut < frames})))


# Texts


def film_prompt(global_caption: str, captions: Sequence[str]) -> str:
    """The prompt of a film, with the number of shots unless ``global_caption`` states it."""
    for text in (global_caption, *captions):
        if tags := [tag for tag in (GLOBAL, PER_SHOT, CUT) if tag in text]:
            raise ValueError(f"{tags[0]} separates the captions of a film and cannot be part of one: {text[:60]!r}")
    counted = "" if "This scene contains" in global_caption else f" This scene contains {len(captions)} shots."
    return f"{GLOBAL} {global_caption}{counted} {PER_SHOT} " + f" {CUT} ".join(captions)


@dataclass(frozen=True)
class TokenRanges:
    """Tokens [first, last + 1) of the global caption, None without one, and of the caption of each shot that is read.

    Tags belong to the caption before them, except the one before the global caption and the one after it.
    """

    whole: Range | None
    shots: tuple[Range, ...]


def token_ranges(prompt: str, tokenizer: Any, length: int) -> TokenRanges:
    """The tokens of each caption of a film's prompt, as the published parser finds them.

    Args:
        prompt: see :func:`film_prompt`; white space is collapsed first, as for the text encoder.
        tokenizer: a fast tokenizer.
        length: tokens that are read, the end token among them.
    """
    prompt = prompt_clean(prompt)
    begin, split = prompt.find(GLOBAL), prompt.find(PER_SHOT)
    spans = [(begin, len(prompt) if split < 0 else split)] if begin >= 0 else []
    if split >= 0:
        ends = [match.end() for match in re.finditer(re.escape(CUT), prompt) if match.start() > split]
        spans += pairwise((split, *ends, len(prompt)))
    found: dict[int, list[int]] = {}
    offsets = tokenizer(prompt, truncation=True, max_length=length, return_offsets_mapping=True).offset_mapping
    for token, (start, end) in enumerate(offsets):
        overlapping = (place for place, (first, last) in enumerate(spans) if start < last and end > first)
        if start < end and (place := next(overlapping, None)) is not None:
            found.setdefault(place, []).append(token)
    ranges = {place: (min(tokens), max(tokens) + 1) for place, tokens in sorted(found.items())}
    whole = ranges.pop(0, None) if begin >= 0 else None
    return TokenRanges(whole, tuple(ranges.values()))


def window_texts(ranges: TokenRanges, shots: int, length: int) -> list[Text]:
    """What each shot reads of the prompt: the global caption, its own, and all padding.

    Both ranges are read one token further than they reach, as by the published code, and so is the last before padding.

    Args:
        shots: of the film.
        length: tokens of the padded prompt.

    Raises:
        ValueError: if there is no global caption, or captions are missing.
    """
    if ranges.whole is None:
        raise ValueError(f"the prompt has no {GLOBAL}: without it no shot would have a text of its own")
    if len(ranges.shots) < shots:
        raise ValueError(
            f"{length} tokens hold the captions of {len(ranges.shots)} of {shots} shots: shorten the prompts, or set "
            f"model.network.text_tokens={2 * length}, which is more than HoloCine was trained with"
        )
    padding = max(end for _, end in (ranges.whole, *ranges.shots)) + 1
    return [Text(spans=_joined([ranges.whole, own], padding, length)) for own in ranges.shots[:shots]]


def _joined(ranges: Sequence[Range], padding: int, length: int) -> tuple[Range, ...]:
    """The tokens of any of the inclusive ``ranges``, and those from ``padding`` on, as ranges that do not overlap."""
    read = [(first, min(last + 1, length)) for first, last in ranges] + [(padding, length)]
    joined: list[Range] = []
    for first, end in sorted(read):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif first < end:
            joined.append((first, end))
    return tuple(joined)


def captions_of(story: Story) -> tuple[str, list[str]]:
    """The global caption and those of the shots: style, overview and looks in the former; who has one is a number."""
    described = {one.name: one.description for one in story.characters if one.description}
    numbers = {name: f"[character{number}]" for number, name in enumerate(described, start=1)}
    looks = [f"{numbers[name]} is {look.rstrip('.')}." for name, look in described.items()]
    overview = f"{story.style}: {story.overview}" if story.style else story.overview
    return " ".join([renamed(overview, numbers), *looks]), [renamed(shot.prompt, numbers) for shot in story.shots]


# The method


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class Released:
    """The published system.

    Args:
        experts: its two networks, in place of those of Wan2.2-T2V-A14B, of which they have names and shapes.
        sampler: how they are sampled.
        video: of a film: its size, rate, and the most frames.
    """

    experts: GgufSettings
    sampler: SamplerSettings
    video: VideoSettings


class HoloCine(JointMethod):
    """The published networks, or its layout on a model that was not trained as they were.

    Args:
        sparse: whether a shot reads only the first latent frame of the others. The published networks of both kinds
            differ.
        released: the published system. It is used where the model has downloaded text-to-video networks, which its
            own replace: then a film is one sequence to the VAE and to the text encoder. Models without such networks
            (toy, tiny) make films with their own, with ``adapter`` if it is given, under the settings of the command;
            each shot and each caption is encoded alone, as they were trained.
        generate, max_shots, adapter: see :class:`storymem.methods.joint.JointMethod`.
    """

    name: ClassVar[str] = "HoloCine"
    objective: ClassVar[str] = "holocine"

    def __init__(
        self,
        *,
        generate: Mapping[str, Any],
        sparse: bool,
        max_shots: int,
        released: Mapping[str, Any] | None = None,
        adapter: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(generate=generate, adapter=adapter, max_shots=max_shots)
        self.sparse, self.is_released = sparse, released is not None and self.settings.model.text_to_video is not None
        self.options = {"sparse": sparse, "one_video": self.is_released}
        if released is not None and self.is_released:
            published, model = build_settings(Released, released), self.settings.model
            self.sampler, self.is_trained = published.sampler, True
            self.model = replace(
                self.model,
                base="wan2.2-t2v-a14b",
                boundary=model.text_to_video_boundary,
                gguf=published.experts,
                video=published.video,
                adapter=None,
                adapters=(),
            )

    def request(self, story: Story) -> FilmRequest:
        layout = partial(holocine, sparse=self.sparse)
        if not self.is_released:
            return self.shots_apart(story, layout)
        reader, count = TextReader.of(self.model), len(story.shots)
        assert reader is not None, "weights were checked"
        plan, prompt = self.plan(story), film_prompt(*captions_of(story))
        windows = window_texts(token_ranges(prompt, reader.tokenizer, reader.limit), count, reader.limit)
        return FilmRequest(
            layout=layout(plan.latent_frames, windows),
            negative_layout=layout(plan.latent_frames, [Text()] * count),
            texts=(prompt,),
            videos=(plan.frames,),
            shots=plan.shots,
            seed=self.seed_of(story),
        )

    def plan(self, story: Story) -> FilmPlan:
        """Equal shots in the longest film; or, if the story gives lengths, those, and for other shots the mean.

        Raises:
            ValueError: if that is longer than the longest film, or too many shots for it.
        """
        most, count = self.model.video.frames, len(story.shots)
        cuts, total = None, most
        if any(shot.frames for shot in story.shots):
            ends = [sum((shot.frames or most // count) for shot in story.shots[:end]) for end in range(1, count + 1)]
            cuts, total = ends[:-1], ends[-1]
        plan = plan_film(count, total, cuts)
        if plan.frames > most or len(plan.shots) < count:
            raise ValueError(
                f"{story.title}: {count} shots of {total} frames do not fit a film of {most} frames at most "
                "(method.released.video.frames); HoloCine was released for 241"
            )
        return plan
