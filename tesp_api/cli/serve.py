"""`tesp serve`: the service on an HTTP port."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from tesp_api import logs
from tesp_api.app import create_app
from tesp_api.errors import TespError
from tesp_api.settings import load, prepare_data_dir


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 for a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where tasks and the embedded Pulsar are kept.")] = None,
    settings_file: Annotated[Path | None, typer.Option("--settings", help="Instead of ./settings.toml.")] = None,
) -> None:
    """Start the service; the options lie over settings.toml and the environment."""
    given = {"server.host": host, "server.port": port, "server.data_dir": data_dir}
    try:
        settings = load(settings_file, overrides={key: value for key, value in given.items() if value is not None})
        logs.configure(settings.logging.level, as_json=settings.logging.output_json)
        prepare_data_dir(settings)
        app = create_app(settings)
    except TespError as error:
        typer.echo(f"tesp-api cannot start: {error}", err=True)
        raise typer.Exit(2) from None
    uvicorn.run(
        app,
        host=settings.server.host,
        port=settings.server.port,
        log_config=None,
        access_log=settings.logging.level == "DEBUG",
        timeout_graceful_shutdown=10,
    )
