"""ST-Bench: how good are these films, and how good is the method that made them?

From the bottom: `layouts`, `mapping` and `films` (which film tells which story, and where its shots lie), `output`
(whose the folder of results is) and `statistics`; `metric` (what a metric is), `metrics`, `cuts`, `dinov2`;
`scoring` (one film, read once, seen by all metrics); `methods` (a story in, a film's folder out) and `workers`;
`results`, `tables`, `plots` and `page`; `stbench`, which the script calls.
"""
