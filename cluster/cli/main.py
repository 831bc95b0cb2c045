"""``openledger``: one command for each thing a person does. Errors are one line on stderr and a non-zero
exit.

Exit codes: 1 refused (``Rejected``), 2 usage, 3 come back later (``Unavailable``), 4 a person must look
(``Corrupted``, or an audit with findings).
"""

import sys
from collections.abc import Sequence

import typer
from rich.console import Console

from attribution.errors import Corrupted, Refusal, Rejected
from cluster.cli import audit, chain, data, demo, models, money, stack

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for module in (stack, data, models, money, audit):
    module.register(app)
app.add_typer(chain.app, name="chain", help="The rollup: deploy, verify and register on any RPC.")
app.command()(demo.demo)


def main(argv: Sequence[str] | None = None) -> None:
    """Console script. Turns refusals into one line; a bug keeps its traceback."""
    try:
        app(list(argv) if argv is not None else None)
    except Refusal as refusal:
        Console(stderr=True).print(
            f"[bold red]{refusal.code}[/]: {refusal.message}", soft_wrap=True, highlight=False
        )
        sys.exit(1 if isinstance(refusal, Rejected) else 4 if isinstance(refusal, Corrupted) else 3)


if __name__ == "__main__":
    main()
