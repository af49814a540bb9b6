"""`tesp migrate`: from the embedded store to MongoDB."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from tesp_api.errors import TespError


def migrate(
    to: Annotated[str | None, typer.Option(help="Where to: a MongoDB URI, instead of db.mongodb_uri.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the tasks are, instead of server.data_dir.")] = None,
    settings_file: Annotated[Path | None, typer.Option("--settings", help="Instead of ./settings.toml.")] = None,
) -> None:
    """Move all tasks of the SQLite store into MongoDB. The service must be stopped; may be repeated."""
    from tesp_api import app  # as in serve: no command of the client is to wait for it
    from tesp_api.settings import load

    given = {"db.mongodb_uri": to, "server.data_dir": data_dir}
    try:
        settings = load(settings_file, overrides={key: value for key, value in given.items() if value is not None})
        moved, there = asyncio.run(app.migrate(settings))
    except TespError as error:
        typer.echo(f"The tasks were not moved: {error}", err=True)
        raise typer.Exit(2) from None
    already = f", {there} were there already" if there else ""
    typer.echo(f"{moved} tasks moved{already}. Set db.mongodb_uri and start the service.")
