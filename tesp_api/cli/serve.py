"""`tesp serve`: the service on an HTTP port.

What only a service needs is imported when one starts: all commands of the client would have to wait for it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tesp_api import logs
from tesp_api.errors import TespError

if TYPE_CHECKING:
    from tesp_api.settings import Settings


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 for a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where tasks and the embedded Pulsar are kept.")] = None,
    settings_file: Annotated[Path | None, typer.Option("--settings", help="Instead of ./settings.toml.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the port and the store.")] = 1,
) -> None:
    """Start the service; the options lie over settings.toml and the environment."""
    if workers > 1:
        _share_port(workers, host, port, data_dir, settings_file)
        return
    import uvicorn

    from tesp_api.app import create_app, settle

    given = {"server.host": host, "server.port": port, "server.data_dir": data_dir}
    settings = _settings({key: value for key, value in given.items() if value is not None}, settings_file)
    try:
        app = create_app(settings)
    except TespError as error:
        raise _cannot_start(error) from None
    settle()
    uvicorn.run(app, host=settings.server.host, port=settings.server.port, **_options(settings))


def _share_port(
    workers: int, host: str | None, port: int | None, data_dir: Path | None, settings_file: Path | None
) -> None:
    """Several processes, each of which reads the settings for itself: they get the options as variables."""
    import uvicorn

    given = {
        "TESP_SERVER__HOST": host,
        "TESP_SERVER__PORT": port,
        "TESP_SERVER__DATA_DIR": data_dir,
        "TESP_SETTINGS_FILE": settings_file,
    }
    os.environ.update({name: str(value) for name, value in given.items() if value is not None})
    settings = _settings({})
    uvicorn.run(
        "tesp_api.tesp_api:app",
        host=settings.server.host,
        port=settings.server.port,
        workers=workers,
        **_options(settings),
    )


def _options(settings: Settings) -> dict[str, Any]:
    from tesp_api.descriptors import BoundedProtocol

    return {
        "log_config": None,
        "access_log": settings.logging.level == "DEBUG",
        "http": BoundedProtocol,
        "timeout_graceful_shutdown": 10,
    }


def _settings(overrides: dict[str, Any], file: Path | None = None) -> Settings:
    """The settings, with the log set up by them and the data directory made; a fault ends the process in one line."""
    from tesp_api.settings import load, prepare_data_dir

    try:
        settings = load(file, overrides=overrides)
        logs.configure(settings.logging.level, as_json=settings.logging.output_json)
        prepare_data_dir(settings)
    except TespError as error:
        raise _cannot_start(error) from None
    return settings


def _cannot_start(error: TespError) -> typer.Exit:
    typer.echo(f"tesp-api cannot start: {error}", err=True)
    return typer.Exit(2)
