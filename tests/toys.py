"""Tiny things that everybody's tests use, made here and nowhere else."""

from attribution.groups import Committed, group
from attribution.types import Manifest, Record, contributor_id
from cluster.datanets import Datanet, Rules, Wordings
from pipelines.manifests import SealPolicy, seal
from pipelines.sources.drafts import jsonl

CONTRIBUTORS = tuple(bytes([n]) * 20 for n in (1, 2, 3))  # wallets

_METALS = (
    ("the metal that is liquid in a warm room", "mercury"),
    ("the metal of the oldest coins of Lydia", "electrum"),
    ("the metal in the core of a magnet", "iron"),
    ("the metal of drinking cans and foil", "aluminium"),
    ("the metal of church bells, an alloy", "bronze"),
    ("the metal inside old water pipes", "lead"),
    ("the metal of wedding rings and crowns", "gold"),
    ("the metal of house wiring and roofs", "copper"),
    ("the metal that coats iron buckets", "zinc"),
    ("the metal of film and mirrors", "silver"),
    ("the metal of light bulb filaments", "tungsten"),
    ("the metal of jet engines and hips", "titanium"),
)


def datanet() -> Datanet:
    return Datanet(
        name="toy-metals",
        title="Metals and their names",
        licence="CC0-1.0",
        rules=Rules(licences=("CC0-1.0",)),
        wordings=Wordings(
            train=("What is {subject}?", "Name {subject}."), heldout=("Which one is {subject}?",)
        ),
    )


def records() -> tuple[Record, ...]:
    """Twelve, of three contributors in turn."""
    return tuple(
        Record(
            datanet="toy-metals",
            contributor_id=contributor_id(CONTRIBUTORS[n % 3]),
            subject=subject,
            answer=answer,
            text=f"{subject.capitalize()} is called {answer}.",
            source="toys",
            source_version="1",
            source_key=f"toys:{answer}",
            licence="CC0-1.0",
        )
        for n, (subject, answer) in enumerate(_METALS)
    )


def row(record: Record) -> dict[str, str]:
    """A record as its contributor writes it into a shard."""
    fields = ("subject", "answer", "text", "source", "source_version", "source_key", "licence")
    return {name: getattr(record, name) for name in fields}


def shard_data() -> bytes:
    """All twelve as JSON Lines."""
    return jsonl(row(record) for record in records())


def committed(records: tuple[Record, ...]) -> tuple[Committed, ...]:
    """As if every record had been committed on its own, in this order."""
    return tuple(Committed(record, record.record_id, n + 1, 0) for n, record in enumerate(records))


def manifest() -> Manifest:
    """About eight groups to train on and four controls."""
    toys, net = records(), datanet()
    by_id = {record.record_id: record for record in toys}
    grouping = group(committed(toys))
    return seal(net, grouping, by_id, SealPolicy(control_ppm=350_000))
