"""Layouts: what the systems are, and what a layout refuses."""

from __future__ import annotations

import pytest

from storymem.wan.segments import (
    Keys,
    Layout,
    Segment,
    Text,
    holocine,
    lct,
    memento,
    memory_cached,
    memory_joint,
    memory_positions,
    single_shot,
    with_given,
)


def positions(layout: Layout) -> list[int]:
    return [position for segment in layout.segments for position in segment.positions]


@pytest.mark.parametrize("build", [memory_joint, memory_cached])
@pytest.mark.parametrize(
    ("memory", "video", "stride", "expected"),
    [
        (0, 3, 5, [0, 1, 2]),
        (1, 2, 5, [-5, 0, 1]),
        (3, 4, 5, [-15, -10, -5, 0, 1, 2, 3]),
        (3, 2, 1, [-3, -2, -1, 0, 1]),
    ],
)
def test_memory_lies_at_negative_positions(build, memory: int, video: int, stride: int, expected: list[int]) -> None:  # type: ignore[no-untyped-def]
    layout = build(memory, video, stride)
    assert positions(layout) == expected
    assert layout.frames == memory + video
    assert layout == single_shot(video) or memory


@pytest.mark.parametrize("stride", [0, -5])
def test_a_stride_that_is_not_positive_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"1 or more, not {stride}"):
        memory_positions(2, stride)


def test_only_cached_memory_is_constant() -> None:
    assert memory_cached(3, 2).constant == {"memory"}
    assert memory_cached(3, 2).only({"memory"}).frames == 3
    assert with_given(memory_cached(3, 2), 1).constant == {"memory"}, "given frames read the noisy video"
    for layout in (single_shot(2), memory_joint(3, 2), memento([-3], 2), holocine([1, 2], [Text()] * 2, sparse=True)):
        assert layout.constant == frozenset()


def test_a_segment_is_constant_only_if_all_that_it_reads_is() -> None:
    def clean(name: str, *reads: str, text: Text | None = None) -> Segment:
        return Segment(name=name, positions=(0,), reads=(reads,), text=text, timestep=0)

    video = Segment(name="video", positions=(1,), reads=(("a", "b", "video"),))
    assert Layout((clean("a", "a"), clean("b", "a", "b"), video)).constant == {"a", "b"}
    assert Layout((clean("a", "a", "video"), clean("b", "a", "b"), video)).constant == frozenset()
    assert Layout((clean("a", "a"), clean("b", "b", text=Text()), video)).constant == {"a"}


def test_given_frames_are_clean_and_read_as_the_video_is() -> None:
    memory, given, video = with_given(memory_cached(2, 4), 2).segments
    assert (given.positions, video.positions) == ((0, 1), (2, 3))
    assert (given.timestep, video.timestep) == (0, None)
    assert given.reads == video.reads == (("memory", "given", "video"),)
    assert memory.reads == (("memory",),)
    assert with_given(single_shot(3), 0) == single_shot(3)


def test_lct_leaves_a_gap_before_each_shot_but_the_first() -> None:
    texts = [Text(name="a"), Text(name="b"), Text(name="c")]
    layout = lct([2, 3, 1], texts, gap=4)
    assert [segment.positions for segment in layout.segments] == [(0, 1), (6, 7, 8), (13,)]
    assert {segment.reads for segment in layout.segments} == {(("shot1", "shot2", "shot3"),)}
    assert [segment.text for segment in layout.segments] == texts
    assert positions(lct([2, 3, 1], texts, gap=0)) == list(range(6))
    with pytest.raises(ValueError, match="must be 0 or more, not -1"):
        lct([1], [Text()], gap=-1)


def test_faulty_layouts_are_refused() -> None:
    video = Segment(name="video", positions=(0, 1), reads=(("video",),))
    with pytest.raises(ValueError, match="different names"):
        Layout((video, video))
    with pytest.raises(ValueError, match="video reads memory, which the layout does not have"):
        memory_cached(2, 2).only({"video"})
    with pytest.raises(ValueError, match="video has 2 frames, not 3"):
        Layout((Segment(name="video", positions=(0, 1), reads=((Keys(segment="video", frames=3),),)),))
    with pytest.raises(ValueError, match="video has no keys to read"):
        Layout((Segment(name="video", positions=(0,), reads=()),))
    with pytest.raises(ValueError, match="do not overlap"):
        Text(spans=((0, 4), (3, 6)))
    with pytest.raises(ValueError, match="leave none of 2"):
        with_given(single_shot(2), 2)
    with pytest.raises(KeyError):
        single_shot(2).span("memory")
    assert memory_cached(3, 2).span("video") == slice(3, 5)
