"""Recall by the coming shot against the published recall, on toy stories with one, two and three characters.

    python -m benchmarks.recall [--quick] [key=value ...]

Generates and scores st_bench/toy by the methods storymem, storymem_characters and storymem_relevant, as `storymem
evaluate` does; key=value are its settings. Prints, for each number of characters, which attributes stay as at first
appearance, and the paired differences from storymem with bootstrap intervals over stories and a permutation test;
writes the table to benchmarks/results/recall.md. Thirty stories take about 20 minutes on two cores (torchrun
--standalone --nproc-per-node=2 -m benchmarks.recall); the same command resumes. --quick: six stories and three steps,
only to see that it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.tables import markdown
from storymem.evaluation.choosing import compose_with_method
from storymem.evaluation.films import stories_of
from storymem.evaluation.results import Results
from storymem.evaluation.statistics import bootstrap_interval, compare
from storymem.evaluation.stbench import evaluate

METHODS = ("storymem", "storymem_characters", "storymem_relevant")
COLUMNS = ("attribute_consistency", "character_consistency", "place_consistency", "characters_apart")
FILE = Path("benchmarks/results/recall.md")


def main() -> None:
    """Generate, score, print, write."""
    quick = "--quick" in sys.argv
    given = [argument for argument in sys.argv[1:] if argument != "--quick"]
    size = ["experiment=stbench_toy_quick", "sampler.steps=3"] if quick else ["experiment=stbench_toy"]
    overrides = [*size, f"output=results/recall{'_quick' if quick else ''}", *given]
    config = compose_with_method(METHODS[0], overrides) | {"method": None, "methods": METHODS}
    results = evaluate(config, lambda name: compose_with_method(name, overrides))
    if results is None:  # in all processes but the first
        return
    stories = stories_of(config["stbench"]["stories"], config["stbench"]["only"])
    heads = ("characters", "column", "method", "mean", "difference from storymem", "higher, lower", "p")
    table = markdown(heads, rows(results, {story.slug: len(story.characters) for story in stories}))
    print(table)
    if not quick:
        FILE.write_text(f"`{' '.join(['python -m benchmarks.recall', *given])}`\n\n{table}\n", encoding="utf-8")


def rows(results: Results, casts: dict[str, int]) -> Iterator[list[object]]:
    """Cells of the table; ``casts``: slug of a story -> number of its characters."""
    for cast in sorted(set(casts.values())):
        for column in COLUMNS:
            of = {
                method: [result.value(column) for result in results.stories[method] if casts[result.slug] == cast]
                for method in METHODS
            }
            complete = [values for values in zip(*of.values(), strict=True) if None not in values]
            for method, values in zip(METHODS, zip(*complete, strict=True), strict=False):
                mean = _percent(sum(values) / len(values), bootstrap_interval(values, results.statistics))
                found = compare([one[0] for one in complete], values, results.statistics)
                cells = ["", "", ""]
                if method != METHODS[0] and found is not None:
                    difference = _percent(found.difference, found.interval, "+")
                    cells = [difference, f"{found.wins}, {found.losses}", f"{found.permutation_p:.3f}"]
                yield [cast, column, method, mean, *cells]


def _percent(value: float, interval: tuple[float, float] | None, sign: str = "") -> str:
    bounds = "" if interval is None else f" [{interval[0]:{sign}.0%}, {interval[1]:{sign}.0%}]"
    return f"{value:{sign}.1%}{bounds}"


if __name__ == "__main__":
    main()
