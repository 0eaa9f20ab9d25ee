"""The studio's page: the storyboard beside what can be done with the chosen shot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import gradio as gr

from storymem.film.storyboard import TEMPLATES
from storymem.studio.actions import Studio
from storymem.studio.board import View, board_html, fates_html, memory_html, pair_html, status_html, version
from storymem.studio.work import outcome

_PICK = """element.addEventListener('click', event => {
  const button = event.target.closest('.pick');
  if (button) trigger('click', {shot: Number(button.dataset.shot)});
});"""

CSS = "".join(TEMPLATES.get_template(name).render() for name in ("film/board.css", "studio/page.css"))


def theme() -> gr.themes.Base:
    """System fonts, and text of a contrast of 4.5:1 or more in light and dark."""
    fonts, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    base = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=mono)
    return base.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        color_accent="*primary_700",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )


class Page:
    """The page of one studio.

    Args:
        studio: what it shows and changes.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Blocks(title="StoryMem studio", analytics_enabled=False, fill_width=True) as self.blocks:
            self._layout()
            self._events()

    # What is on it

    def _layout(self) -> None:
        self.command = gr.Textbox(
            label="The same from the command line",
            placeholder="What you do here is shown here as a command.",
            lines=1,
            max_lines=4,
            interactive=False,
        )
        self.notice = gr.Markdown(elem_id="notice")
        self.seen = gr.State("")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self.board = gr.HTML(elem_classes="board", js_on_load=_PICK)
            with gr.Column(scale=2, min_width=320, elem_classes="actions"):
                with gr.Row():
                    self.make = gr.Button("Make what is missing", variant="primary")
                    self.stop = gr.Button("Stop")
                self.status = gr.HTML()
                self.shot = gr.Dropdown(label="Shot", interactive=True)
                with gr.Tab("Takes"):
                    self._takes_tab()
                with gr.Tab("Edit"):
                    self._edit_tab()
                with gr.Tab("Memory"):
                    self._memory_tab()
                with gr.Tab("Stories"):
                    self._stories_tab()
        self.timer = gr.Timer(1)

    def _takes_tab(self) -> None:
        with gr.Row():
            self.take = gr.Dropdown(label="Take", interactive=True, min_width=120)
            self.other = gr.Dropdown(label="Compare with", interactive=True, min_width=120)
        self.pair = gr.HTML()
        self.choose = gr.Button("Show this take in the film")
        with gr.Row():
            self.count = gr.Slider(1, 8, value=1, step=1, label="How many", min_width=120)
            self.following = gr.Checkbox(label="and all later shots", min_width=120)
        self.again = gr.Button("Make more takes of this shot", variant="primary")

    def _edit_tab(self) -> None:
        self.prompt = gr.Textbox(label="Prompt", lines=3)
        self.characters = gr.CheckboxGroup(label="Characters")
        with gr.Row():
            self.seed = gr.Number(label="Seed", info="empty: by its place", precision=0, min_width=120)
            self.frames = gr.Number(label="Frames", info="4n + 1; empty: as set", precision=0, min_width=120)
        self.cut = gr.Checkbox(label="A cut (else it continues the shot before)")
        self.overwrite = gr.Checkbox(label="Overwrite the story file that is open (else a copy is saved beside it)")
        self.save = gr.Button("Save the shot", variant="primary")
        with gr.Row():
            self.earlier = gr.Button("Move earlier", min_width=120)
            self.later = gr.Button("Move later", min_width=120)
            self.remove = gr.Button("Remove", min_width=120)
        self.new = gr.Textbox(label="Prompt of a new shot after this one", lines=2)
        self.add = gr.Button("Add the shot")

    def _memory_tab(self) -> None:
        self.memory = gr.HTML(elem_classes="memory")
        self.keyframe = gr.Dropdown(label="Keyframe", interactive=True)
        with gr.Row():
            self.pin = gr.Button("Pin", min_width=80)
            self.unpin = gr.Button("Unpin", min_width=80)
            self.drop = gr.Button("Drop", min_width=80)
            self.replace = gr.UploadButton("Replace", file_types=["image"], min_width=80)
        self.who = gr.Dropdown(label="Who a new image shows", interactive=True)
        self.image = gr.UploadButton("Add an image", file_types=["image"])
        self.fates = gr.HTML(elem_classes="memory")

    def _stories_tab(self) -> None:
        self.queue = gr.CheckboxGroup(label="Stories beside this one")
        self.enqueue = gr.Button("Make their films, one after the other")
        self.idea = gr.Textbox(label="An idea for a story", lines=2)
        self.length = gr.Slider(1, 40, value=8, step=1, label="Shots")
        with gr.Row():
            self.url = gr.Textbox(label="Endpoint", info="OpenAI-compatible; empty: show the prompt", min_width=140)
            self.name = gr.Textbox(label="Its model", info="the name there", min_width=140)
        self.write = gr.Button("Write the story")
        self.answer = gr.Textbox(label="A story: YAML, JSON or a language model's answer", lines=4, max_lines=12)
        self.bring = gr.Button("Save and open this story")

    # What it does

    def _events(self) -> None:
        do, over = self.studio, self.overwrite
        self._on(self.make, lambda _: do.make())
        self._on(self.choose, do.choose, self.take)
        self._on(self.again, self._make_again, self.count, self.following)
        self._on(self.save, self._save, self.prompt, self.characters, self.seed, self.frames, self.cut, over)
        self._on(self.add, lambda n, text, over: do.add_shot(n, text, overwrite=over), self.new, over, by=1)
        self._on(self.remove, lambda n, over: do.remove_shot(n, overwrite=over), over)
        self._on(self.earlier, lambda n, over: do.move_shot(n, -1, overwrite=over), over, by=-1)
        self._on(self.later, lambda n, over: do.move_shot(n, 1, overwrite=over), over, by=1)
        self._on(self.pin, lambda _, id: do.pin(id), self.keyframe)
        self._on(self.unpin, lambda _, id: do.pin(id, pinned=False), self.keyframe)
        self._on(self.drop, lambda _, id: do.drop(id), self.keyframe)
        self._on(self.replace, self._with_upload(do.replace), self.keyframe, self.replace)
        self._on(self.image, self._with_upload(lambda who, file: do.add_image(file, who)), self.who, self.image)
        self._on(self.enqueue, lambda _, paths: "\n".join(do.make(story=Path(path)) for path in paths), self.queue)
        self._on(self.bring, lambda _, text: do.import_story(text), self.answer)
        asked = [self.idea, self.length, self.url, self.name]
        self.write.click(self._write, asked, [self.command, self.notice, self.answer])
        self.stop.click(do.worker.stop)
        chosen = [self.shot, self.keyframe]
        self.board.click(self._pick, self.keyframe, self._outputs)
        self.shot.input(self._refreshed, chosen, self._outputs)
        for one in (self.take, self.other):
            one.input(self._pair, [self.shot, self.take, self.other], self.pair)
        self.timer.tick(self._tick, [self.seen, *chosen], [self.status, *self._of_film], show_progress="hidden")
        self.blocks.load(self._refreshed, chosen, self._outputs)

    @property
    def _of_film(self) -> list[Any]:
        return [self.seen, self.board, self.take, self.other, self.pair, self.memory, self.keyframe, self.fates]

    @property
    def _outputs(self) -> list[Any]:
        edited = [self.prompt, self.characters, self.seed, self.frames, self.cut]
        return [self.shot, *edited, self.who, self.queue, *self._of_film]

    def _on(self, button: Any, action: Callable[..., str], *inputs: Any, by: int = 0) -> None:
        """On a click or an upload, run ``action`` with the shot and ``inputs``; show its command, or its error.

        ``by``: how far the shot that is chosen then is from it.
        """

        def run(shot: int, keyframe: str | None, *values: Any) -> list[Any]:
            done: list[str] = []
            result = outcome(lambda: done.append(action(shot, *values)))
            command, *notes = done[0].split("\n# ") if done else ("", result)
            notice = "" if result == "done" and not notes else "\n\n".join(notes)
            return [command if done else gr.skip(), notice, *self._refreshed(shot + by if done else shot, keyframe)]

        event = button.upload if isinstance(button, gr.UploadButton) else button.click
        event(run, [self.shot, self.keyframe, *inputs], [self.command, self.notice, *self._outputs])

    @staticmethod
    def _with_upload(action: Callable[[Any, Path], str]) -> Callable[..., str]:
        """``action`` of a value and an uploaded file, of which only what ``action`` writes stays."""

        def run(_shot: int, value: Any, file: str) -> str:
            try:
                return action(value, Path(file))
            finally:
                Path(file).unlink(missing_ok=True)

        return run

    def _make_again(self, shot: int, takes: int, following: bool) -> str:
        more = [*(["following=true"] if following else []), *([f"takes={takes}"] if takes > 1 else [])]
        return self.studio.make(f"shot={shot}", *more)

    def _save(
        self, shot: int, prompt: str, names: list[str], seed: int | None, frames: int | None, cut: bool, overwrite: bool
    ) -> str:
        values = {"prompt": prompt, "characters": names, "seed": seed, "frames": frames, "cut": None if cut else False}
        return self.studio.edit_shot(shot, overwrite=overwrite, **values)

    def _write(self, idea: str, shots: int, url: str, name: str) -> list[Any]:
        found: list[tuple[str, str]] = []
        result = outcome(lambda: found.append(self.studio.write_story(idea, shots, url, name)))
        if not found:
            return [gr.skip(), result, gr.skip()]
        note = (
            "" if url else "This is the prompt for a language model. Replace it by the model's answer, and open that."
        )
        return [found[0][0], note, found[0][1]]

    # What it shows

    def _pick(self, keyframe: str | None, event: gr.EventData) -> list[Any]:
        return self._refreshed(event.shot, keyframe)

    def _refreshed(self, shot: int | None, keyframe: str | None) -> list[Any]:
        """Values of ``_outputs``, with ``shot`` (from 1) and ``keyframe`` (an id) chosen."""
        view = View(self.studio)
        story = view.story
        self.blocks.allowed_paths = [str(self.studio.folder.resolve())]  # of the film that is open, and no other files
        shot = min(max(shot or 1, 1), len(story.shots))
        now = story.shots[shot - 1]
        shots = [
            (f"{n}: {shorten(one.prompt, 44, placeholder='...')}", n) for n, one in enumerate(story.shots, start=1)
        ]
        return [
            gr.update(choices=shots, value=shot),
            now.prompt,
            gr.update(choices=[character.name for character in story.characters], value=list(now.characters)),
            now.seed,
            now.frames,
            gr.update(value=now.cut, interactive=shot > 1),
            gr.update(choices=[("no character", ""), *((one.name, one.name) for one in story.characters)], value=""),
            gr.update(choices=[(path.name, str(path)) for path in self.studio.other_stories], value=[]),
            *self._film(view, shot, keyframe),
        ]

    @staticmethod
    def _film(view: View, shot: int, keyframe: str | None) -> list[Any]:
        """Values of ``_of_film``."""
        takes = [take.take for take in view.film.takes_of(shot - 1)]
        chosen = take.take if (take := view.film.take_of(shot - 1)) else None
        shown = chosen or (takes[-1] if takes else None)
        other = next((take for take in reversed(takes) if take != shown), None)
        ids = [(f"{number}: {entry.id}", entry.id) for number, entry in enumerate(view.entries or (), start=1)]
        named = [(f"take {take}{' (shown)' if take == chosen else ''}", take) for take in takes]
        return [
            view.version,  # so that a tick does not undo what is chosen after an action
            board_html(view, shot),
            gr.update(choices=named, value=shown),
            gr.update(choices=named, value=other),
            pair_html(view, shot, [take for take in (shown, other) if take is not None]),
            memory_html(view),
            gr.update(choices=ids, value=keyframe if keyframe in dict(ids).values() else None),
            fates_html(view, shot),
        ]

    def _pair(self, shot: int, take: int | None, other: int | None) -> str:
        return pair_html(View(self.studio), shot, [one for one in (take, other) if one is not None])

    def _tick(self, seen: str, shot: int | None, keyframe: str | None) -> list[Any]:
        """The progress, and the film when it has changed."""
        changed = version(self.studio) != seen and shot is not None
        film = self._film(View(self.studio), shot or 1, keyframe) if changed else [gr.skip()] * len(self._of_film)
        return [self._status(), *film]

    def _status(self) -> str:
        jobs = self.studio.worker.jobs
        shown = [job for job in jobs if job.state != "waiting"] or jobs
        return status_html(shown[-1] if shown else None, sum(job.state == "waiting" for job in jobs))
