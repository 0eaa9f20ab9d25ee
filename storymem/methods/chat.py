"""Questions to a language model with checked objects as answers, which are saved with the film.

An answer is saved under a hash of its question, as soon as it is accepted: a run that resumes asks nothing twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from storymem.io import hash_json, read_json_object, write_json
from storymem.story.parser import StoryError
from storymem.story.writing import EndpointError, EndpointSettings, ask, find_object

T = TypeVar("T")

_FORM = "{question}\n\nAnswer with one JSON object that fits this JSON schema, and with nothing else:\n{schema}"
_AGAIN = "This answer cannot be used: {problem}. Answer with the whole corrected JSON object and with nothing else."


class Chat:
    """Asks an OpenAI-compatible endpoint.

    Args:
        endpoint: where.
        file: of the answers, a JSON object; created with the first.
        tries: for one question.

    Attributes:
        calls: how often the endpoint was asked.
    """

    def __init__(self, endpoint: EndpointSettings, file: Path, *, tries: int) -> None:
        self.endpoint, self.file, self.tries = endpoint, file, tries
        self.calls = 0
        self._kept: dict[str, Any] = read_json_object(file) if file.exists() else {}

    def ask(self, question: str, kind: type[T], check: Callable[[T], None]) -> T:
        """The answer to ``question`` as a ``kind``, a pydantic dataclass.

        Args:
            question: what is asked; the schema of the answer is added.
            kind: of the answer.
            check: raises ``ValueError`` for an answer that fits the schema and cannot be used.

        Raises:
            EndpointError: if the endpoint cannot be asked, or no answer of ``tries`` can be used.
        """
        adapter = TypeAdapter(kind)
        text = _FORM.format(question=question, schema=json.dumps(adapter.json_schema()))
        key = hash_json([self.endpoint.model, text])[:16]
        if key in self._kept:
            return adapter.validate_python(self._kept[key])
        messages = [{"role": "user", "content": text}]
        problem = ""
        for _ in range(self.tries):
            self.calls += 1
            answer = ask(self.endpoint, messages)
            try:
                content, _ = find_object(answer)
                found = adapter.validate_python(content)
                check(found)
            except (StoryError, ValidationError, ValueError) as error:
                problem = _reason(error)
                again = {"role": "user", "content": _AGAIN.format(problem=problem)}
                messages = [messages[0], {"role": "assistant", "content": answer}, again]
                continue
            self._kept[key] = content
            write_json(self.file, self._kept)
            return found
        raise EndpointError(
            f"{self.endpoint.model} gave no answer that can be used in {self.tries} tries ({problem}): use another "
            "endpoint.model, or run the same command again; accepted answers are saved"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problems = error.errors(include_url=False)[:4]
        return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in problems)
    return " ".join(str(error).split())
