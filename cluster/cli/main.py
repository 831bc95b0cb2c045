"""``openledger``: one command for each thing a person does. Errors are one line on stderr and a non-zero
exit.

Exit codes: 1 refused (``Rejected``), 2 usage, 3 come back later (``Unavailable``), 4 a person must look
(``Corrupted``, or an audit with findings). Each command imports what it needs when it runs, so `--help` is
quick, and Ray finds its environment set before it is imported.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from attribution.errors import Corrupted, Refusal, Rejected
from cluster.config import load_settings
from cluster.head import prepare_environment

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
datanet = typer.Typer(no_args_is_help=True)
period = typer.Typer(no_args_is_help=True)
chain = typer.Typer(no_args_is_help=True)
model = typer.Typer(no_args_is_help=True)
app.add_typer(datanet, name="datanet", help="Datanets and what is contributed to them.")
app.add_typer(model, name="model", help="Adapters that were trained elsewhere.")
app.add_typer(period, name="period", help="Payout periods.")
app.add_typer(chain, name="chain", help="The rollup: deploy, verify and register on any RPC.")

KeyOf = Annotated[str, typer.Option("--key-of", help="whose API key of this laptop to use")]
Rpc = Annotated[str, typer.Option("--rpc", help="JSON-RPC address of the rollup; default: chain.rpc_url")]
KeyFile = Annotated[Path, typer.Option("--key-file", help="hex private key, mode 600, of who pays the gas")]
Addresses = Annotated[Path | None, typer.Option(help="deployment file; default: chain.addresses_path")]
PAYER = "demo-payer-1"


@app.command()
def up() -> None:
    """Start what does not run yet: rollup, DA, contracts, signer, Ray, settler, gateway, engine."""
    from cluster.cli import stack

    stack.up(load_settings())


@app.command()
def down(
    forget: Annotated[bool, typer.Option(help="also remove all data but the set-up caches")] = False,
) -> None:
    """Stop what `up` started. What matters is on disk and is there again at the next `up`."""
    from cluster.cli import stack

    stack.down(load_settings(), forget)


@app.command()
def status() -> None:
    """What runs, and what waits."""
    from cluster.cli import stack

    stack.status(load_settings())


@app.command("jobs-url")
def jobs_url() -> None:
    """Print where Ray's Jobs API is, for `ray job submit`."""
    from cluster import head

    print(head.find(load_settings()).jobs_url)


@app.command()
def demo(fresh: Annotated[bool, typer.Option(help="redo everything but the set-up")] = False) -> None:
    """From shard to claim in one command: contribute, train, answer, settle, pay, claim. Then it stays up."""
    from cluster.cli import demo

    demo.demo(load_settings(), fresh)


@datanet.command("list")
def datanet_list() -> None:
    """Every Datanet with its shards and records."""
    from cluster.cli import data

    data.list_datanets(load_settings())


@datanet.command("fill")
def datanet_fill(source: Annotated[str, typer.Argument(help="python-lint or computing-terms")]) -> None:
    """Open a real Datanet and let its demo contributors commit to, reveal and sign their shards."""
    from cluster.cli import data

    data.fill(load_settings(), source)


@datanet.command("contribute")
def datanet_contribute(
    name: str, file: Path, wallet: Annotated[str, typer.Option(help="name of a wallet of this laptop")]
) -> None:
    """Commit to a JSON Lines file, reveal it and sign: one row is {subject, answer, text, source, …}."""
    from cluster.cli import data

    data.contribute_file(load_settings(), name, file, wallet)


@datanet.command("ingest")
def datanet_ingest(spec: Path) -> None:
    """Validate what was revealed, group duplicates, seal a manifest."""
    from cluster.cli import models

    models.run_spec(load_settings(), "ingest", spec)


@datanet.command("spec")
def datanet_spec(datanet: str, name: Annotated[str, typer.Option(help="owner/model of the result")]) -> None:
    """Print a fine-tuning spec for the Datanet's newest manifest."""
    from cluster.cli import data

    print(data.finetune_spec(load_settings(), datanet, name), end="")


@app.command()
def key(label: str) -> None:
    """Print an API key with trial credit, the same one every time; the platform's sponsor pays."""
    from cluster.cli import people
    from cluster.database import connect

    settings = load_settings()
    print(people.trial_key(settings, connect(settings.database_url), label))


@app.command()
def train(spec: Annotated[Path, typer.Argument(help="YAML, see configs/train-python-lint.yaml")]) -> None:
    """Fine-tune an adapter on sealed manifests. The same spec again is answered from what it made before."""
    from cluster.cli import models

    models.run_spec(load_settings(), "finetune", spec)


@app.command("eval")
def evaluate(spec: Annotated[Path, typer.Argument(help="YAML with the adapter and the questions")]) -> None:
    """Base and tuned side by side on held-out wordings and never-trained controls."""
    from cluster.cli import models

    models.run_spec(load_settings(), "evaluate", spec)


@app.command()
def deploy(ref: Annotated[str, typer.Argument(help="owner/model@version")]) -> None:
    """Make this version what the bare name means. Workers load it with the first request that asks for it."""
    from cluster.cli import models

    models.deploy(load_settings(), ref)


@model.command("import")
def model_import(
    folder: Annotated[Path, typer.Argument(help="adapter_config.json and adapter_model.safetensors")],
    name: Annotated[str, typer.Option(help="owner/model")],
    price: Annotated[int, typer.Option(min=0, help="gwei per token")] = 2_000,
    prefix: Annotated[Path | None, typer.Option(help="its system prompt, published")] = None,
) -> None:
    """Check, pack and publish a LoRA adapter that PEFT saved for this base model."""
    from cluster.cli import models

    models.import_peft(load_settings(), folder, name, price, prefix)


@model.command("prefix")
def model_prefix(
    ref: Annotated[str, typer.Argument(help="owner/model@version")],
    system_prompt: Annotated[Path, typer.Argument(help="a text file")],
) -> None:
    """Publish an adapter's system prompt: what is computed of it is then shared by all who send it."""
    from cluster.cli import models

    models.publish_prefix(load_settings(), ref, system_prompt)


@app.command()
def chat(model: str, question: str, key_of: KeyOf = PAYER) -> None:
    """Ask one question and watch the answer come."""
    from cluster.cli import models

    models.chat(load_settings(), model, question, key_of)


@app.command()
def usage(key_of: KeyOf = PAYER) -> None:
    """What an API key has used and paid, by model."""
    from cluster.cli import money

    money.usage(load_settings(), key_of)


@app.command()
def evidence(receipt_id: str, key_of: KeyOf = PAYER) -> None:
    """A receipt, the records found behind its answer, and how far it is settled."""
    from cluster.cli import money

    money.evidence(load_settings(), receipt_id, key_of)


@app.command()
def explain(receipt_id: str) -> None:
    """What one answer put into every record's credit: one replay of the training on its own gradient."""
    from cluster.cli import money

    money.explain(load_settings(), receipt_id)


@period.command("close")
def period_close() -> None:
    """Pay out all that is settled and not yet paid: credits, payouts, one reward root on chain."""
    from cluster.cli import money

    money.close(load_settings())


@app.command()
def claim(
    who: Annotated[list[str], typer.Argument(help="labels, ids or wallets; `all` for everyone")],
) -> None:
    """Draw what was earned, for its owners: it goes to the wallets on record, the platform pays the gas."""
    from cluster.cli import money

    money.claim(load_settings(), who)


@app.command()
def audit(
    rpc: Rpc = "",
    addresses: Addresses = None,
    da: Annotated[str, typer.Option(help="eigenda-proxy; `none` for the archive alone")] = "",
    archive: Annotated[str, typer.Option(help="file:DIR or s3://BUCKET/PREFIX; `none` for DA alone")] = "",
    provenance: Annotated[bool, typer.Option(help="also follow records to receipts, in our rows")] = False,
    influence: Annotated[bool, typer.Option(help="also replay trainings; takes as long and more")] = False,
    tag: Annotated[str, typer.Option(help="latest, safe or finalized")] = "latest",
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Recompute every capture, payout and root from the chain. Exits 4 if anything does not hold."""
    from cluster.cli import audit

    where = audit.Where(rpc, addresses, da, archive, tag)
    asked = {"provenance": provenance, "influence": influence}
    if not audit.audit(load_settings(), where, [name for name, is_on in asked.items() if is_on], as_json):
        sys.exit(4)


@chain.command("deploy")
def chain_deploy(
    key_file: KeyFile,
    settler: Annotated[str, typer.Option(help="address of the settler's signer")],
    guardian: Annotated[str, typer.Option(help="address that may disable a pending period")],
    treasury: Annotated[str, typer.Option(help="receives the token supply; default: the key's")] = "",
    rpc: Rpc = "",
    addresses: Addresses = None,
) -> None:
    """Create all contracts, verify them, and write the deployment file."""
    from cluster.cli import chain

    people = chain.People(settler, guardian, treasury)
    chain.deploy(load_settings(), key_file, people, rpc, addresses)


@chain.command("verify")
def chain_verify(rpc: Rpc = "", addresses: Addresses = None) -> None:
    """Check code, wiring, delays and roles of what stands on the chain against the deployment file."""
    from cluster.cli import chain

    chain.verify(load_settings(), rpc, addresses)


@chain.command("register")
def chain_register(wallets: list[str], key_file: KeyFile, rpc: Rpc = "", addresses: Addresses = None) -> None:
    """Put wallets on record, so that they can be paid. Anyone may pay for it."""
    from cluster.cli import chain

    chain.register(load_settings(), wallets, key_file, rpc, addresses)


def main() -> None:
    """Console script. Turns refusals into one line; a bug keeps its traceback."""
    try:
        prepare_environment(load_settings())
        app()
    except Refusal as refusal:
        line = f"[bold red]{refusal.code}[/]: {refusal.message}"
        Console(stderr=True).print(line, soft_wrap=True, highlight=False)
        sys.exit(1 if isinstance(refusal, Rejected) else 4 if isinstance(refusal, Corrupted) else 3)


if __name__ == "__main__":
    main()
