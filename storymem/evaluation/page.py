"""Results as a page that opens from disk: everything is inside it, so it can be sent to somebody as one file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from storymem.evaluation.metric import Pair
from storymem.evaluation.plots import Mark, colour, interval_plot, matrix, story_plot
from storymem.evaluation.results import Results
from storymem.evaluation.scoring import ShotResult, StoryResult, picture_name
from storymem.evaluation.tables import ABSENT, COMPARED, mean_and_interval, number, percent
from storymem.io import write_text
from storymem.media.video import READER

PAGE = "index.html"

_WORST = 3  # pairs shown of those that pulled a story's score down
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #767676; --back: #fff; --ink: #1a1a1a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --soft: #9a9a9a; --back: #16181c; --ink: #e6e6e6; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1.2rem;
       background: var(--back); color: var(--ink); }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0; }
h4 { font-size: .85rem; margin: 1rem 0 .3rem; }
.soft, .note { color: var(--soft); } .note { font-size: .85rem; } .bad { color: var(--bad); }
.banner { background: #b3261e; color: #fff; font-weight: 700; padding: .8rem 1rem; border-radius: .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; } tbody.published { color: var(--soft); }
td small { display: block; color: var(--soft); white-space: nowrap; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } figure { margin: 0; } figcaption { font-size: .85rem; }
svg { max-width: 100%; height: auto; } svg text:not([fill]) { fill: currentColor; }
svg .soft { fill: var(--soft); } svg .grid { stroke: var(--line); } svg .absent { fill: none; stroke: var(--soft);
  stroke-dasharray: 3 3; }
.key i { display: inline-block; width: .75rem; height: .75rem; border-radius: 50%; margin: 0 .3rem 0 1rem; }
details.story { border-top: 1px solid var(--line); padding: .5rem 0; }
details.story > summary { cursor: pointer; display: flex; gap: 1rem; flex-wrap: wrap; align-items: baseline; }
details.story > summary::before { content: '▸'; width: .6rem; }
details.story[open] > summary::before { content: '▾'; }
summary b { min-width: 16rem; } summary span { font-size: .82rem; color: var(--soft); }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .8rem; margin: .8rem 0; }
.sheet img, .pair img { width: 100%; border-radius: .3rem; display: block; }
.sheet figcaption { font-size: .78rem; line-height: 1.35; margin-top: .2rem; }
.gone { border: 1px dashed var(--bad); border-radius: .3rem; padding: .8rem; color: var(--bad); font-size: .8rem; }
.analysis { display: flex; flex-wrap: wrap; gap: 2rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem .6rem; max-width: 34rem; margin-bottom: .8rem; }
.pair p { grid-column: 1 / -1; margin: 0; font-size: .82rem; }
"""


def write_page(results: Results, output: Path) -> Path:
    """Write ``index.html`` into ``output``, with the pictures of ``output/stories/<system>/<story>/``."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>ST-Bench</title>",
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>",
        "<h1>ST-Bench</h1>",
        "" if results.banner is None else f"<p class=banner>⚠ {escape(results.banner)}</p>",
        _introduction(results),
        "<h2>Means over stories</h2>",
        _table(results),
        _overview(results),
        *(_comparison(results, first, second) for first, second in results.comparisons),
        "<h2>Story by story</h2>",
        *_by_story(results),
        *(_system(results, name, output) for name in results.stories),
        _how(results),
        "</html>",
    ]
    path = output / PAGE
    write_text(path, "\n".join(parts))
    return path


def _introduction(results: Results) -> str:
    titles = results.benchmark["titles"]
    texts, cut = results.texts
    lines = [f"{len(results.stories)} system{'s' * (len(results.stories) > 1)}, {len(titles)} stories."]
    if texts:
        lines.append(f"{cut} of {texts} texts are longer than the text encoder reads and were cut.")
    said = f"<p class=soft>{escape(' '.join(lines))}</p>"
    for system in results.stories:
        if missing := results.missing(system):
            items = "".join(f"<li>{escape(line)}</li>" for line in missing)
            said += f"<details open class=bad><summary>{escape(system)}: {len(missing)} missing shots</summary>"
            said += f"<ul>{items}</ul></details>"
        if faults := results.faults(system):
            items = "".join(f"<li>{escape(line)}</li>" for line in faults)
            said += f"<details open class=bad><summary>{escape(system)}: values that are not finite</summary>"
            said += f"<ul>{items}</ul></details>"
    return said


def _table(results: Results) -> str:
    head = "".join(f"<th>{escape(column.heading)}</th>" for column in results.columns)
    body = ""
    for system, summaries in results.summaries.items():
        cells = [mean_and_interval(summaries[column.name]) for column in results.columns]
        row = "".join(f"<td>{mean}<small>{interval}</small></td>" for mean, interval in cells)
        body += f"<tr><th>{escape(system)}</th>{row}</tr>"
    published, mark = "", "† " if results.published else ""
    for name, known in results.published.items():
        numbers = "".join(f"<td>{number(known.get(column.name))}</td>" for column in results.columns)
        published += f"<tr><th>{escape(name)} †</th>{numbers}</tr>"
    return (
        f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>"
        f"<tbody class=published>{published}</tbody></table></div><p class=note>{mark}{results.published_note}. In "
        f"brackets {100 * results.statistics.level:g} % bootstrap intervals over stories. Where a story lacks a value "
        "there is no mean; the one over the other stories stands in round brackets.</p>"
    )


def _overview(results: Results) -> str:
    figures = []
    for column in results.columns:
        marks = []
        for place, (system, summaries) in enumerate(results.summaries.items()):
            found = summaries[column.name]
            interval = found.interval if found.mean is not None else None
            marks.append(Mark(name=system, value=found.mean, interval=interval, colour=colour(place)))
        for name in ("Wan2.2, independent shots", "StoryMem"):
            row = results.published.get(name, {})
            if column.name in row:
                marks.append(Mark(name=f"{name} †", value=row[column.name], published=True))
        plot = interval_plot(marks, label=column.title)
        figures.append(f"<figure><figcaption><b>{escape(column.title)}</b></figcaption>{plot}</figure>")
    return f"<div class=plots>{''.join(figures)}</div>"


def _comparison(results: Results, first: str, second: str) -> str:
    rows = ""
    for column in results.columns:
        found = results.comparisons[first, second][column.name]
        if found is None:
            rows += f"<tr><th>{escape(column.title)}</th>{f'<td>{ABSENT}</td>' * 5}</tr>"
            continue
        interval = f"[{number(found.interval[0])}, {number(found.interval[1])}]" if found.interval else ""
        cells = [
            f"{number(found.difference)}<small>{interval}</small>",
            percent(found),
            f"{found.wins} / {found.losses} of {found.stories}",
            f"{found.sign_p:.4f}",
            f"{found.permutation_p:.4f}",
        ]
        rows += f"<tr><th>{escape(column.title)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    head = "".join(f"<th>{name}</th>" for name in ("", *COMPARED))
    return (
        f"<h2>{escape(second)} against {escape(first)}</h2><div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _by_story(results: Results) -> list[str]:
    key = "".join(
        f"<i style='background:{colour(place)}'></i>{escape(system)}" for place, system in enumerate(results.stories)
    )
    parts = [f"<p class='note key'>{key}</p>"]
    titles = results.benchmark["titles"]
    headline = next((c for c in results.columns if c.name == "consistency_overall"), results.columns[0])
    for column in sorted(results.columns, key=lambda column: column is not headline):
        systems = {name: [result.value(column.name) for result in found] for name, found in results.stories.items()}
        plot = story_plot(titles, systems, label=f"{column.title}, story by story")
        opened = " open" if column is headline else ""
        parts.append(f"<details{opened}><summary>{escape(column.title)}</summary>{plot}</details>")
    return parts


def _system(results: Results, system: str, output: Path) -> str:
    stories = results.stories[system]
    everything = [result for found in results.stories.values() for result in found]
    values = [value for result in everything for *_, value in _pairs(result) if value is not None]
    bounds = (min(values), max(values)) if values else (0.0, 1.0)
    parts = [f"<h2>{escape(system)}, story by story</h2>"]
    for place, result in enumerate(stories):
        said = " · ".join(f"{column.heading} {number(result.value(column.name))}" for column in results.columns)
        opened = " open" if place == 0 else ""
        parts.append(
            f"<details class=story{opened}><summary><b>{escape(result.title)}</b><span>{said}</span></summary>"
        )
        parts += [_reasons(results, result), *_story(result, output / "stories" / system / result.slug, bounds)]
        parts.append("</details>")
    return "\n".join(parts)


def _reasons(results: Results, result: StoryResult) -> str:
    said = {column.heading: result.reason(column.name) for column in results.columns}
    lines = [f"{heading}: {reason}" for heading, reason in said.items() if reason is not None]
    return f"<p class='note bad'>{escape('; '.join(lines))}</p>" if lines else ""


def _story(result: StoryResult, pictures: Path, bounds: tuple[float, float]) -> list[str]:
    strips = [
        _picture(pictures / picture_name(shot.index)) if picture_name(shot.index) in result.pictures else None
        for shot in result.shots
    ]
    sheet = "".join(_shot(result, shot, strip) for shot, strip in zip(result.shots, strips, strict=True))
    parts = [f"<div class=sheet>{sheet}</div><div class=analysis>"]
    if pairs := _pairs(result):
        table: list[list[float | None]] = [[None] * len(result.shots) for _ in result.shots]
        for i, j, value in pairs:
            table[i][j] = table[j][i] = value
        drawn = matrix(table, bounds=bounds, label=f"Similarity of shots, {result.title}")
        parts.append(f"<figure><h4>Similarity of shots</h4>{drawn}</figure>")
        parts.append(f"<div><h4>Pairs that pulled the score down</h4>{_worst(pairs, strips)}</div>")
    if characters := _characters(result):
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{number(value)}</td></tr>" for name, value in characters)
        parts.append(f"<div><h4>Identity of characters</h4><table>{rows}</table></div>")
    return [*parts, "</div>"]


def _shot(result: StoryResult, shot: ShotResult, strip: str | None) -> str:
    values = [(name, found[shot.index]) for scores in result.scores.values() for name, found in scores.shots.items()]
    said = " · ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in values if value is not None)
    shown = strip or f"<div class=gone>missing: {escape(shot.missing or 'the picture')}</div>"
    label = escape(shot.label[:1].upper() + shot.label[1:]) + ("" if shot.cut else ", continued")
    caption = f"<b>{label}</b><br>{escape(shot.prompt)}<br><span class=soft>{said}</span>"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _worst(pairs: Sequence[Pair], strips: Sequence[str | None]) -> str:
    known = sorted((value, i, j) for i, j, value in pairs if value is not None)
    if len(known) < 2:
        return "<p class=note>there is only one pair</p>"
    total = sum(value for value, *_ in known)
    average = total / len(known)
    shown = ""
    for value, i, j in known[:_WORST]:
        without = (total - value) / (len(known) - 1)
        said = f"<b>shots {i + 1} and {j + 1}</b>: {number(value)}, {number(average - value)} below the story's mean"
        said += f"; without this pair the story would have {number(without)}"
        shown += f"<div class=pair><p>{said}</p>{strips[i] or ''}{strips[j] or ''}</div>"
    return shown


def _pairs(result: StoryResult) -> tuple[Pair, ...]:
    """The pairs that the matrix shows: all of them, if a metric looked at all."""
    found = {name: pairs for scores in result.scores.values() for name, pairs in scores.pairs.items()}
    return found.get("consistency_overall") or next(iter(found.values()), ())


def _characters(result: StoryResult) -> list[tuple[str, float | None]]:
    return [item for scores in result.scores.values() for item in scores.details.get("characters", {}).items()]


def _picture(path: Path) -> str | None:
    if not path.is_file():
        return None
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img loading=lazy alt='first, middle and last frame' src='data:image/jpeg;base64,{data}'>"


def _how(results: Results) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td style='text-align:left'>"
        + "<br>".join(
            f"{escape(key.replace('_', ' '))}: {escape(str(value))}"
            for key, value in metric.items()
            if key != "columns"
        )
        + "</td></tr>"
        for name, metric in results.metrics.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    versions += f"; videos read by {READER}"
    return (
        f"<h2>How it was measured</h2><div class=scroll><table>{rows}</table></div><p class=note>{escape(versions)}</p>"
    )
