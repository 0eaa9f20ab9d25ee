"""Settings of ``train.yaml``; loads no torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import PlainValidator
from pydantic.dataclasses import dataclass

from storymem.config import STRICT
from storymem.training.objectives.settings import AnyObjective, MemoryObjectiveSettings, build_objective_settings
from storymem.training.run_settings import RunSettings

#: The settings of one of several objectives, or a node whose ``_target_`` is their class.
Objective = Annotated[AnyObjective, PlainValidator(build_objective_settings)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainSettings(RunSettings):
    """Everything ``train`` can be given.

    Args:
        objective: what is trained: memory (StoryMem), or another system's, see :mod:`storymem.training.objectives`.
    """

    objective: Objective = field(default_factory=MemoryObjectiveSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective.check(self)
