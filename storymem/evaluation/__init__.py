"""ST-Bench: how good are films, and how good is the method that made them?

In reading order: `metric` (what a metric is), `metrics`, `motion`, `crops`, `entities`, `references`, `faces`, `cuts`;
`layouts`, `mapping`, `films` (which film belongs to which story, and which videos are its shots); `controls`, `scoring`
(a film, read once, measured by all metrics), `jobs`; `statistics`, `published`, `results`, `plots`, `report`;
`workers`, `choosing` and `stbench`, the command.
"""
