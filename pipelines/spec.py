"""A job's spec: one YAML or JSON document, from a file or from storage, checked once by its model."""

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from attribution.errors import Rejected
from cluster.storage import Storage


class Spec(BaseModel):
    """What every job's spec has. A misspelt name is refused, so it is never silently ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str  # the submission id: the same id is the same run, done once


S = TypeVar("S", bound=BaseModel)


def load_spec(model: type[S], location: str, storage: Storage) -> S:
    """Read ``PATH``, ``file:PATH`` or ``storage:KEY``.

    Raises:
        Rejected: missing, no YAML mapping, or a value is wrong; the message names the field and the value.
    """
    try:
        document = yaml.safe_load(_read(location, storage))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Rejected("spec_yaml", f"{location}: {error}", field="spec") from error
    if not isinstance(document, dict):
        raise Rejected("spec_yaml", f"{location}: wants a mapping, found {type(document).__name__}")
    return check_spec(model, document)


def check_spec(model: type[S], document: object) -> S:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise Rejected(
            "spec_value", f"{field}: {first['msg']}, given {first['input']!r}"[:400], field=field
        ) from error


def _read(location: str, storage: Storage) -> bytes:
    if location.startswith("storage:"):
        return storage.get(location.removeprefix("storage:"))
    try:
        return Path(location.removeprefix("file:")).read_bytes()
    except OSError as error:
        raise Rejected("spec_missing", f"{location}: {error.strerror}", field="spec") from error
