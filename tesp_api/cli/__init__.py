"""`tesp`: start the service, and talk to one."""

from __future__ import annotations

import typer

from tesp_api.cli import client, migrate, serve

# Tracebacks as they are: pretty ones show local variables, and with them secrets.
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="GA4GH Task Execution Service."
)
app.command("serve")(serve.serve)
app.command("migrate")(migrate.migrate)
for command in (client.run, client.get, client.list_tasks, client.wait, client.logs, client.cancel, client.sites):
    app.command(command.__name__.removesuffix("_tasks"))(command)


def main() -> None:
    """The entry point of the console script."""
    app()
