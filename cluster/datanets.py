"""A Datanet's terms as a value and as a row: what it accepts, under which licence, and how it is asked."""

import json
from dataclasses import asdict, dataclass

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy.orm import Session

from attribution.errors import Corrupted, Rejected
from cluster.tables import DatanetRow


class Rules(BaseModel):
    """What one Datanet accepts; ``pipelines/validation.py`` applies it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    licences: tuple[str, ...]  # SPDX expressions, each spelled exactly as rows must spell it
    languages: tuple[str, ...] = ("en",)
    language_min_chars: int = 80  # shorter passages cannot be told apart reliably
    language_min_ppm: int = 950_000  # how sure the detector must be before a row is refused
    min_subject_chars: int = 8
    max_subject_chars: int = 600
    max_answer_chars: int = 160
    max_text_chars: int = 60_000
    max_line_bytes: int = 262_144


@dataclass(frozen=True, slots=True)
class Wordings:
    """Each holds ``{subject}`` exactly once, and no held-out wording is ever trained with."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    def __post_init__(self) -> None:
        for wording in (*self.train, *self.heldout):
            if wording.count("{subject}") != 1:
                raise Rejected("wording", f"{wording!r} must hold {{subject}} exactly once", field="wordings")
        shared = set(self.train) & set(self.heldout)
        if shared or not self.train:
            raise Rejected("wording", f"trained with and held out: {sorted(shared)}", field="wordings")


@dataclass(frozen=True, slots=True)
class Datanet:
    name: str
    title: str
    licence: str  # of the whole, an SPDX expression
    rules: Rules
    wordings: Wordings


def open_datanet(session: Session, datanet: Datanet, owner_id: bytes) -> None:
    """Publish the terms. The same terms again are a no-op; other terms under the name are ``Rejected``."""
    row = session.get(DatanetRow, datanet.name)
    if row is None:
        session.add(
            DatanetRow(
                name=datanet.name,
                title=datanet.title,
                owner_id=owner_id.hex(),
                licence=datanet.licence,
                rules_json=datanet.rules.model_dump_json(),
                wordings_json=json.dumps(asdict(datanet.wordings), ensure_ascii=False),
            )
        )
        session.flush()
    elif row.owner_id != owner_id.hex() or _from_row(row) != datanet:
        raise Rejected(
            "datanet_exists",
            f"{datanet.name} is owned by {row.owner_id} with other terms or another owner",
            field="name",
            http_status=409,
        )


def load_datanet(session: Session, name: str) -> Datanet:
    row = session.get(DatanetRow, name)
    if row is None:
        raise Rejected("unknown_datanet", f"no Datanet {name!r}", field="datanet", http_status=404)
    return _from_row(row)


def _from_row(row: DatanetRow) -> Datanet:
    try:
        rules = Rules.model_validate_json(row.rules_json)
    except ValidationError as error:
        raise Corrupted("datanet_rules", f"{row.name}: {error.errors()[0]['msg']}", field="rules") from error
    wordings = json.loads(row.wordings_json)
    return Datanet(
        row.name,
        row.title,
        row.licence,
        rules,
        Wordings(tuple(wordings["train"]), tuple(wordings["heldout"])),
    )
