"""Settings: read once from settings.toml and the environment into typed, frozen values.

Sections of the file are profiles; `FASTAPI_PROFILE` lays one over `default`. `TESP_...` variables lie over both
(`TESP_SERVER__PORT=8081`, two underscores for a dot), `CONTAINER_TYPE` over `container.runtime`. A key that is not
known or a value that is not right stops the start with one line that names it, and the variable it came from.
A text `env:NAME` stands for the variable NAME, so that secrets need not be in the file; `env:` and no name is refused.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin
from urllib.parse import urlsplit

from dynaconf import Dynaconf
from dynaconf.utils.parse_conf import parse_conf_data
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tesp_api.errors import SettingsError
from tesp_api.parameters import QUEUE

NOT_SETTINGS = frozenset({"settings_file", "require_services"})
"""TESP_ variables that mean something else."""

BY_MAIL = ("amqp", "relay")
"""Carriers that speak by letters."""

SHORTEST_LEASE_BY_MAIL = 20.0
"""Seconds."""

VARIABLE = "env:"
"""What the text begins with that stands for a variable."""

SITE_NAME = "[A-Za-z0-9_.-]{1,64}"
"""What the name of a site looks like."""

Origins = dict[tuple[str, ...], str]
"""Which variable a setting came from, by the setting's path."""


# Kinds of values. Their messages never repeat the value: an address may hold a password.


def _is_web(text: str) -> bool:
    if not text.isprintable() or " " in text:
        return False
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _web(text: str) -> str:
    if not _is_web(text):
        raise ValueError("must be http:// or https:// with a host")
    return text


def _web_or_nothing(text: str) -> str:
    return _web(text) if text else text


def _pulsar_or_nothing(text: str) -> str:
    """A query would be dropped, and with it a token that somebody has put there."""
    if "?" in text or "#" in text:
        raise ValueError("must have neither a query nor a fragment; a token belongs in private_token")
    return _web_or_nothing(text)


def _broker_or_nothing(text: str) -> str:
    if text and not _is_broker(text):
        raise ValueError("must be amqp:// or amqps:// with a host")
    return text


def _is_broker(text: str) -> bool:
    if not text.isprintable() or " " in text:
        return False
    try:
        parts = urlsplit(text)
        return parts.scheme in ("amqp", "amqps") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _contact(text: str) -> str:
    if text and not _is_web(text) and not re.fullmatch(r"mailto:[^\s@]+@[^\s@]+", text):
        raise ValueError("must be http:// or https:// with a host, or mailto: with an address")
    return text


def _engine(text: str) -> str:
    tcp = re.fullmatch(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]]+):([0-9]{1,5})/?", text)
    if text and not re.fullmatch(r"unix:///.+", text) and not (tcp and 0 < int(tcp.group(2)) <= 65535):
        raise ValueError("must be unix:///path or tcp://host:port")
    return text


def _absolute(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("must be an absolute path")
    return text


def _one_as_list(value: Any) -> Any:
    """A plain text is a list of one. With a comma it was most likely meant as several, so it is refused."""
    if not isinstance(value, str):
        return value
    if "," in value:
        raise ValueError('must be a list such as ["a", "b"] where there is a comma')
    return [value] if value else []


def _roots(value: Any) -> Any:
    """A root may be given as its path alone."""
    value = _one_as_list(value)
    if isinstance(value, list | tuple):
        return [{"path": root} if isinstance(root, str) else root for root in value]
    return value


def _public(text: str) -> str:
    if text and (not _is_web(text) or not text.isascii() or any(sign in text for sign in "?#@")):
        raise ValueError("must be http:// or https:// with a host, in ASCII, without a user, a query and a fragment")
    return text


def _of_form(pattern: str, words: str) -> AfterValidator:
    """Only texts of that pattern; `words` says of which form they must be."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(words)
        return text

    return AfterValidator(check)


WebUrl = Annotated[str, AfterValidator(_web)]
OptionalWebUrl = Annotated[str, AfterValidator(_web_or_nothing)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_one_as_list)]
Queue = Annotated[str, _of_form(QUEUE, "must be 1 to 64 of A-Z a-z 0-9 _ . -, and begin with neither . nor -")]


class Section(BaseModel):
    """Base of the sections: frozen, and strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Server(Section):
    """The HTTP server and what it keeps."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    public_url: Annotated[str, AfterValidator(_public)] = ""
    data_dir: Path = Path("data")
    cors_origins: Texts = ()
    max_body_mb: float = Field(default=32.0, gt=0)
    hide_canceling: bool = False
    roles: Annotated[tuple[Literal["api", "dispatch"], ...], BeforeValidator(_one_as_list)] = Field(
        default=("api", "dispatch"), min_length=1
    )


class ServiceInfo(Section):
    """What `/service-info` says."""

    id: str = "org.example.tesp-api"
    name: str = "tesp-api"
    description: str = "GA4GH Task Execution Service in front of Galaxy Pulsar"
    organization_name: str = "Example organization"
    organization_url: WebUrl = "https://example.org"
    contact_url: Annotated[str, AfterValidator(_contact)] = ""
    documentation_url: OptionalWebUrl = ""
    environment: str = ""
    storage: Texts = ()


class Db(Section):
    """The store."""

    mongodb_uri: str = Field(default="", repr=False)


class FileRootSettings(Section):
    """A directory of the site that `file:` URLs may name."""

    path: Annotated[str, AfterValidator(_absolute)]
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
    disk_gb: float = Field(default=0.0, ge=0)
    file_roots: Annotated[tuple[FileRootSettings, ...], BeforeValidator(_roots)] = ()
    runtime: Literal["", "auto", "docker", "bubblewrap", "host"] = ""
    status: Status = Status()
    cancel_grace: float = Field(default=10.0, gt=0)


class Pulsar(SiteKeys):
    """One Pulsar behind a REST address, or behind a message broker."""

    url: Annotated[str, AfterValidator(_pulsar_or_nothing)] = Field(default="", repr=False)
    amqp_url: Annotated[str, AfterValidator(_broker_or_nothing)] = Field(default="", repr=False)
    amqp_key_prefix: Annotated[str, _of_form("[A-Za-z0-9_.-]{0,100}", "must be at most 100 of A-Z a-z 0-9 _ . -")] = ""
    private_token: str = Field(default="", repr=False)
    manager: str = ""
    client_timeout: float = Field(default=30.0, gt=0)
    batch: bool = False
    queues: Annotated[tuple[Queue, ...], BeforeValidator(_one_as_list)] = ()


class Embedded(SiteKeys):
    """The Pulsar that the service starts for itself when none is named."""


RELAY_PASSWORD = 16
"""Characters at least: whoever reaches the relay may guess as often as our server answers."""


class SiteSettings(Pulsar):
    """One of several sites."""

    name: Annotated[str, _of_form(SITE_NAME, "must be 1 to 64 of A-Z a-z 0-9 _ . -")]
    carrier: Literal["rest", "amqp", "relay", "embedded", "local"]
    relay_user: str = ""
    relay_password: str = Field(default="", repr=False)
    relay_topic_prefix: Annotated[str, _of_form("[A-Za-z0-9_-]{0,64}", "must be at most 64 of A-Z a-z 0-9 _ -")] = ""
    zones: Texts = ()
    labels: dict[str, str] = {}
    preemptible: bool = False
    draining: bool = False

    @property
    def relay_account(self) -> str:
        """Whom the site's Pulsar logs in as."""
        return self.relay_user or self.name


class Container(Section):
    """How the node runs containers, unless the site says otherwise."""

    runtime: Literal["auto", "docker", "bubblewrap", "host"] = "auto"
    docker_host: Annotated[str, AfterValidator(_engine)] = ""
    network: str = ""
    pull: Literal["missing", "never"] = "missing"
    log_bytes: int = Field(default=131072, ge=1024, le=16 << 20)


class Dispatch(Section):
    """The loops that move tasks."""

    lease: float = Field(default=30.0, ge=1)
    take_over: float = Field(default=5.0, ge=1, le=300)


class Retry(Section):
    """When to try a task again, and how that is shown."""

    max_attempts: int = Field(default=3, ge=1, le=100)
    backoff: float = Field(default=5.0, gt=0, le=300)
    fold: bool = False


class Retention(Section):
    """How long ended tasks are kept."""

    days: float = Field(default=0.0, ge=0)


class Logging(Section):
    """The service's own log."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    output_json: bool = False


class BasicAuth(Section):
    """One user with a password."""

    enable: bool = False
    username: str = ""
    password: str = Field(default="", repr=False)


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
    retention: Retention = Retention()
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
        for index, site in enumerate(self.sites):
            if site.carrier == "rest" and not site.url:
                raise ValueError(f"sites.{index}.url: the carrier rest needs the address of its Pulsar")
            if site.carrier == "amqp" and not site.amqp_url:
                raise ValueError(f"sites.{index}.amqp_url: the carrier amqp needs the address of its broker")
        self._check_relays()
        return self

    @model_validator(mode="after")
    def _no_pulsar_beside_them(self) -> Self:
        """An address that is passed over looks like a site that gets no jobs."""
        for key in ("url", "amqp_url"):
            if self.sites and getattr(self.pulsar, key):
                raise ValueError(
                    f"pulsar.{key}: with [[default.sites]] that Pulsar is not used; unset it, or make it one of them"
                )
        return self

    @model_validator(mode="after")
    def _letters_take_their_time(self) -> Self:
        """What needs an errand at a Pulsar that is reached by letters must fit into a fraction of a lease."""
        if not self.sites and self.pulsar.url and self.pulsar.amqp_url:
            raise ValueError(
                "pulsar.amqp_url: pulsar.url is set as well, and a Pulsar is reached in one way; unset one"
            )
        by_mail = any(site.carrier in BY_MAIL for site in self.sites) if self.sites else bool(self.pulsar.amqp_url)
        if by_mail and self.dispatch.lease < SHORTEST_LEASE_BY_MAIL:
            raise ValueError(
                f"dispatch.lease: a site by {' or '.join(BY_MAIL)} needs {SHORTEST_LEASE_BY_MAIL:.0f} seconds or more"
            )
        return self

    def _check_relays(self) -> None:
        """A Pulsar has one login for all its managers, so sites may share an account, but never a topic in it."""
        passwords: dict[str, str] = {}
        topics = set()
        for index, site in enumerate(self.sites):
            if site.carrier != "relay":
                continue
            if not site.relay_password:
                raise ValueError(f"sites.{index}.relay_password: the carrier relay needs what its Pulsar logs in with")
            if len(site.relay_password) < RELAY_PASSWORD:
                raise ValueError(f"sites.{index}.relay_password: must have at least {RELAY_PASSWORD} characters")
            if passwords.setdefault(site.relay_account, site.relay_password) != site.relay_password:
                raise ValueError(f"sites.{index}.relay_password: another site has the same user, and another password")
            topic = (site.relay_account, site.relay_topic_prefix, site.manager or "_default_")
            if topic in topics:
                raise ValueError(f"sites.{index}.manager: another site has the same user, prefix and manager")
            topics.add(topic)

    @model_validator(mode="after")
    def _only_what_works(self) -> Self:
        """A setting that this release cannot fulfil must not be taken in silence, least of all one that protects."""
        missing = {
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
    values, origins = _read(_file(file, environ), environ)
    for key, value in (overrides or {}).items():
        path = tuple(key.split("."))
        _put(values, path, value)
        origins.pop(path, None)
    values = _with_variables(values, environ, origins)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_words(error, values, origins)) from None


def prepare_data_dir(settings: Settings) -> None:
    """Make server.data_dir if it is not there, and see that files can be made in it. Raises SettingsError."""
    directory = settings.server.data_dir.absolute()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except FileExistsError:
        raise SettingsError(f"settings: server.data_dir: {directory} is not a directory") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"settings: server.data_dir: {directory} cannot be written to: {reason}") from None


def _file(file: Path | None, environ: Mapping[str, str]) -> Path | None:
    if file is None and (named := environ.get("TESP_SETTINGS_FILE")):
        file = Path(named)
    if file is not None:
        if not file.is_file():
            raise SettingsError(f"settings: there is no file {file}")
        return file
    here = Path("settings.toml")
    return here if here.is_file() else None


def _read(file: Path | None, environ: Mapping[str, str]) -> tuple[dict[str, Any], Origins]:
    profile = environ.get("FASTAPI_PROFILE") or "default"
    _check(profile, file)
    try:
        # dynaconf lets a section of the profile take the place of the whole section, not of its keys.
        values = _merged(_section(file, "default"), _section(file, profile))
    except Exception as error:  # dynaconf passes on whatever its TOML reader raises
        raise SettingsError(f"settings: {file} cannot be read: {' '.join(str(error).split())}") from None
    origins: Origins = {}
    _check_sections(values, origins)
    for name, text in sorted(environ.items()):  # sorted: a whole section before its keys
        if name.startswith("TESP_") and name[5:].lower() not in NOT_SETTINGS:
            path = tuple(name[5:].lower().split("__"))
            _put(values, path, text if _is_text(path) else _value(name, text))
            origins[path] = name
            _check_sections(values, origins)
    if runtime := environ.get("CONTAINER_TYPE"):
        path = ("container", "runtime")
        _put(values, path, runtime)
        origins[path] = "CONTAINER_TYPE"
    return values, origins


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


def _is_text(path: tuple[str, ...]) -> bool:
    """Whether a setting is text: a token of digits is no number."""
    model: Any = Settings
    for name in path:
        known = getattr(model, "model_fields", {})
        if name not in known:
            return False
        model = known[name].annotation
    return model in (str, Path)


def _check(profile: str, file: Path | None) -> None:
    """What dynaconf would pass over without a word: a profile that is nowhere, and settings outside any profile."""
    names: set[str] = set()
    # dynaconf reads settings.local.toml beside settings.toml too.
    for each in (file, file.with_name(f"{file.stem}.local{file.suffix}")) if file else ():
        if each == file or each.is_file():
            names |= _profiles(each)
    if profile != "default" and profile.lower() not in names:
        raise SettingsError(f"settings: FASTAPI_PROFILE is {profile!r}, but {file} has no section [{profile}]")


def _profiles(file: Path) -> set[str]:
    """The profiles of a file, in lower case."""
    try:
        sections = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"settings: {file} cannot be read: {' '.join(str(error).split())}") from None
    for name, value in sections.items():
        if name.lower() in Settings.model_fields:
            left, right = ("[[", "]]") if isinstance(value, list) else ("[", "]")
            raise SettingsError(f"settings: {left}{name}{right} in {file} must be {left}default.{name.lower()}{right}")
        if not isinstance(value, dict):
            raise SettingsError(f"settings: {name} in {file} is in no section; keys belong below [default.SECTION]")
    return {name.lower() for name in sections}


def _check_sections(values: dict[str, Any], origins: Origins) -> None:
    """A section given as one value would be in the way of its keys."""
    for path, is_section in _tree(Settings):
        if is_section:
            found: Any = values
            for name in path:
                found = found.get(name, {}) if isinstance(found, dict) else {}
            if not isinstance(found, dict):
                raise SettingsError(f"settings: {'.'.join(path)} is a section, not a value{_from(path, origins)}")


def _tree(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The path of every section and key, and whether it is a section."""
    for name, known in model.model_fields.items():
        path, kind = (*above, name), known.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield path, True
            yield from _tree(kind, path)
        else:
            yield path, False


def _plain(value: Any) -> Any:
    """dynaconf's boxes as plain containers, keys in lower case."""
    if isinstance(value, Mapping):
        return {str(key).lower(): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            inner = values[name] = {}
        values = inner
    values[path[-1]] = value


def _value(name: str, text: str) -> Any:
    """A variable's text as a TOML value where it is one (`8081`, `true`, `["/data"]`), else as it stands."""
    try:
        return _plain(parse_conf_data(text, tomlfy=True))
    except Exception:  # as with files; without the text, which may be a secret
        raise SettingsError(f"settings: the value of {name} cannot be read") from None


def _with_variables(values: dict[str, Any], environ: Mapping[str, str], origins: Origins) -> dict[str, Any]:
    """`values` with each text `env:NAME` in them replaced by that variable's text."""

    def replaced(value: Any, at: tuple[int | str, ...] = ()) -> Any:
        if isinstance(value, dict):
            return {key: replaced(each, (*at, key)) for key, each in value.items()}
        if isinstance(value, list):
            return [replaced(each, (*at, index)) for index, each in enumerate(value)]
        if not isinstance(value, str) or not value.startswith(VARIABLE):
            return value
        name = value.removeprefix(VARIABLE)
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):  # not repeated: who knows what it is
            fault = f"what follows {VARIABLE} must be the name of a variable: A-Z a-z 0-9 _, not a digit first"
        elif text := environ.get(name):
            return text
        else:
            fault = f"the variable {name} is not set, or empty"
        raise SettingsError(f"settings: {_key(at, values)}: {fault}{_from(at, origins)}")

    return {key: replaced(each, (key,)) for key, each in values.items()}


def _words(error: ValidationError, values: Mapping[str, Any], origins: Origins) -> str:
    """The first fault as one line that names the key, and the variable if it came from one."""
    fault = error.errors(include_url=False)[0]
    location = fault["loc"]
    if fault["type"] == "extra_forbidden":
        return f"settings: {_key(location, values)} is not a known key" + _from(
            location, origins, _alike(location, origins)
        )
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "tuple_type":
        message = "must be a list"
    elif fault["type"] == "model_type":
        message = "must be a table"
    if not location:  # said of the whole: the message begins with the key
        key, _, message = message.partition(": ")
        location = tuple(key.split("."))
    return f"settings: {_key(location, values)}: {message}{_from(location, origins)}"


def _key(location: tuple[int | str, ...], values: Mapping[str, Any]) -> str:
    """The key as the file has it, with the name of the site if it is one of a site's."""
    key = ".".join(str(part) for part in location)
    if location[0] != "sites" or len(location) < 2:
        return key
    try:
        name = values["sites"][int(location[1])]["name"]
    except (LookupError, TypeError, ValueError):
        return key
    return f"{key} ({name})" if isinstance(name, str) and re.fullmatch(SITE_NAME, name) else key


def _from(location: tuple[int | str, ...], origins: Origins, meant: str = "") -> str:
    """` (from VARIABLE; do you mean ...?)`, as far as there is something to say."""
    name = _origin(location, origins)
    said = [f"from {name}"] if name else []
    if meant:
        said.append(f"do you mean {meant}?")
    return f" ({'; '.join(said)})" if said else ""


def _origin(location: tuple[int | str, ...], origins: Origins) -> str:
    for path in sorted(origins, key=len, reverse=True):
        shorter = min(len(path), len(location))
        if path[:shorter] == location[:shorter]:
            return origins[path]
    return ""


def _alike(location: tuple[int | str, ...], origins: Origins) -> str:
    """What a key that is not known may have been meant to be, written as it was given: key or variable."""
    model: Any = Settings
    for part in location[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            model = model.model_fields[part].annotation
            model = get_args(model)[0] if get_origin(model) is tuple else model
    known = list(getattr(model, "model_fields", ()))
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    path = tuple(str(part) for part in location)
    if path not in origins:
        return close[0] if close else ""
    keys = [each for each, is_section in _tree(Settings) if not is_section]
    written = "_".join(path).replace("__", "_")
    found = (
        [each for each in keys if "_".join(each) == written]  # TESP_SERVER_PORT
        or [(*path[:-1], each) for each in close]
        or [each for each in keys if len(path) == 1 and each[-1] == path[0]]  # TESP_PORT
    )
    return " or ".join("TESP_" + "__".join(each).upper() for each in found[:3])
