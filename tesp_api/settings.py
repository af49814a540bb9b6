"""Settings: read once from settings.toml and the environment into typed, frozen values.

Sections of the file are profiles; `FASTAPI_PROFILE` lays one over `default`. `TESP_...` variables lie over both
(`TESP_SERVER__PORT=8081`, two underscores for a dot), `CONTAINER_TYPE` over `container.runtime`. A key that is not
known or a value that is not right stops the start with one line that names it.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from dynaconf import Dynaconf
from dynaconf.utils.parse_conf import parse_conf_data
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tesp_api.errors import SettingsError

NOT_SETTINGS = frozenset({"settings_file", "require_services"})
"""TESP_ variables that mean something else."""


class Section(BaseModel):
    """Base of the sections: frozen, and strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Server(Section):
    """The HTTP server and what it keeps."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    data_dir: Path = Path("data")
    cors_origins: tuple[str, ...] = ()
    max_body_mb: float = Field(default=32.0, gt=0)
    hide_canceling: bool = False


class ServiceInfo(Section):
    """What `/service-info` says."""

    id: str = "org.example.tesp-api"
    name: str = "tesp-api"
    description: str = "GA4GH Task Execution Service in front of Galaxy Pulsar"
    organization_name: str = "Example organization"
    organization_url: str = "https://example.org"
    contact_url: str = ""
    documentation_url: str = ""
    environment: str = ""
    storage: tuple[str, ...] = ()


class Db(Section):
    """The store."""

    mongodb_uri: str = ""


class FileRootSettings(Section):
    """A directory of the site that `file:` URLs may name."""

    path: str = Field(pattern="^/")
    write: bool = True
    mount: bool = False


class Status(Section):
    """How often to look at jobs."""

    poll_interval: float = Field(default=5.0, gt=0)
    max_polls: int = Field(default=60, gt=0)


class SiteKeys(Section):
    """What every kind of site has."""

    max_jobs: int = Field(default=0, ge=0)
    cpus: float = Field(default=0.0, ge=0)
    ram_gb: float = Field(default=0.0, ge=0)
    file_roots: tuple[FileRootSettings, ...] = ()
    runtime: Literal["", "auto", "docker", "bubblewrap", "host"] = ""
    status: Status = Status()
    cancel_grace: float = Field(default=10.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _plain_roots(cls, value: Any) -> Any:
        """A root may be given as its path alone."""
        if isinstance(value, dict) and isinstance(value.get("file_roots"), list | tuple):
            roots = [{"path": root} if isinstance(root, str) else root for root in value["file_roots"]]
            value = {**value, "file_roots": roots}
        return value


class Pulsar(SiteKeys):
    """One Pulsar behind a REST address."""

    url: str = ""
    amqp_url: str = ""
    private_token: str = ""
    manager: str = ""
    client_timeout: float = Field(default=30.0, gt=0)


class Embedded(SiteKeys):
    """The Pulsar that the service starts for itself when none is named."""


class SiteSettings(Pulsar):
    """One of several sites."""

    name: str = Field(pattern="^[A-Za-z0-9_.-]{1,64}$")
    carrier: Literal["rest", "embedded", "local"]


class Container(Section):
    """How the node runs containers, unless the site says otherwise."""

    runtime: Literal["auto", "docker", "bubblewrap", "host"] = "auto"
    docker_host: str = ""
    network: str = ""
    pull: Literal["missing", "never"] = "missing"
    log_bytes: int = Field(default=131072, ge=1024, le=16 << 20)


class Dispatch(Section):
    """The loops that move tasks."""

    lease: float = Field(default=30.0, ge=1)


class Retry(Section):
    """When to try a task again."""

    max_attempts: int = Field(default=3, ge=1)


class Logging(Section):
    """The service's own log."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    output_json: bool = False


class BasicAuth(Section):
    """One user with a password."""

    enable: bool = False
    username: str = ""
    password: str = ""


class OAuth(Section):
    """Tokens of an OpenID Connect provider."""

    enable: bool = False


class Settings(Section):
    """All settings. Sections and keys are described in settings.toml."""

    server: Server = Server()
    service: ServiceInfo = ServiceInfo()
    db: Db = Db()
    pulsar: Pulsar = Pulsar()
    embedded: Embedded = Embedded()
    sites: tuple[SiteSettings, ...] = ()
    container: Container = Container()
    dispatch: Dispatch = Dispatch()
    retry: Retry = Retry()
    logging: Logging = Logging()
    basic_auth: BasicAuth = BasicAuth()
    oauth: OAuth = OAuth()

    @model_validator(mode="after")
    def _sites_of_their_own(self) -> Self:
        """A task remembers its site by name."""
        names = [site.name for site in self.sites]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sites: {name!r} is the name of more than one site")
        return self

    @model_validator(mode="after")
    def _only_what_works(self) -> Self:
        """A setting that this release cannot fulfil must not be taken in silence, least of all one that protects."""
        missing = {
            "db.mongodb_uri": bool(self.db.mongodb_uri),
            "pulsar.amqp_url": bool(self.pulsar.amqp_url) or any(site.amqp_url for site in self.sites),
            "basic_auth.enable": self.basic_auth.enable,
            "oauth.enable": self.oauth.enable,
        }
        for key, wanted in missing.items():
            if wanted:
                raise ValueError(f"{key}: this release does not have that yet; leave it unset")
        return self


def load(
    file: Path | None = None, environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Settings from `file` (else `TESP_SETTINGS_FILE`, else ./settings.toml, else the defaults) and the environment.

    `overrides` maps dotted keys to values and lies over everything. Raises SettingsError.
    """
    environ = os.environ if environ is None else environ
    values = _read(_file(file, environ), environ)
    if runtime := environ.get("CONTAINER_TYPE"):
        values.setdefault("container", {})["runtime"] = runtime
    for key, value in (overrides or {}).items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_words(error)) from None


def _file(file: Path | None, environ: Mapping[str, str]) -> Path | None:
    if file is None and (named := environ.get("TESP_SETTINGS_FILE")):
        file = Path(named)
    if file is not None:
        if not file.is_file():
            raise SettingsError(f"settings: there is no file {file}")
        return file
    here = Path("settings.toml")
    return here if here.is_file() else None


def _read(file: Path | None, environ: Mapping[str, str]) -> dict[str, Any]:
    profile = environ.get("FASTAPI_PROFILE") or "default"
    _check_profile(profile, file)
    try:
        # dynaconf lets a section of the profile take the place of the whole section, not of its keys.
        values = _merged(_section(file, "default"), _section(file, profile))
    except Exception as error:  # dynaconf passes on whatever its TOML reader raises
        raise SettingsError(f"settings: {file} cannot be read: {' '.join(str(error).split())}") from None
    for name, text in environ.items():
        if name.startswith("TESP_") and name[5:].lower() not in NOT_SETTINGS:
            path = name[5:].lower().split("__")
            _put(values, path, text if _is_text(path) else _value(text))
    return values


def _section(file: Path | None, profile: str) -> dict[str, Any]:
    bag = Dynaconf(
        settings_files=[str(file.resolve())] if file else [],
        environments=True,
        env=profile,
        envvar_prefix=False,
        core_loaders=["TOML"],
        loaders=[],
    )
    return {key.lower(): _plain(value) for key, value in bag.as_dict().items()}


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, key by key; lists are replaced."""
    both = {**below, **above}
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            both[key] = _merged(below[key], value)
    return both


def _is_text(path: list[str]) -> bool:
    """Whether a setting is text: a token of digits is no number."""
    model: Any = Settings
    for name in path:
        known = getattr(model, "model_fields", {})
        if name not in known:
            return False
        model = known[name].annotation
    return model in (str, Path)


def _check_profile(profile: str, file: Path | None) -> None:
    """A profile that is nowhere would leave the defaults in force without a word."""
    if profile == "default":
        return
    try:
        sections = tomllib.loads(file.read_text()) if file else {}
    except ValueError as error:
        raise SettingsError(f"settings: {file} cannot be read: {error}") from None
    if profile.lower() not in {name.lower() for name in sections}:
        raise SettingsError(f"settings: FASTAPI_PROFILE is {profile!r}, but {file} has no section [{profile}]")


def _plain(value: Any) -> Any:
    """dynaconf's boxes as plain containers, keys in lower case."""
    if isinstance(value, Mapping):
        return {str(key).lower(): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            inner = values[name] = {}
        values = inner
    values[path[-1]] = value


def _value(text: str) -> Any:
    """A variable's text as a TOML value where it is one (`8081`, `true`, `["/data"]`), else as it stands."""
    return _plain(parse_conf_data(text, tomlfy=True))


def _words(error: ValidationError) -> str:
    """The first fault as one line that names the key."""
    fault = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"settings: {key} is not a known key{_hint(fault['loc'])}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"settings: {key + ': ' if key else ''}{message}"


def _hint(location: tuple[int | str, ...]) -> str:
    model: Any = Settings
    for part in location[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            model = model.model_fields[part].annotation
            model = get_args(model)[0] if get_origin(model) is tuple else model
    known = list(getattr(model, "model_fields", ()))
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f" (do you mean {close[0]}?)" if close else ""
