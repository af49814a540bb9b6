"""Settings: file, profiles, environment, and one clear line for what is wrong."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from tesp_api.errors import SettingsError
from tesp_api.settings import Settings, load, prepare_data_dir

FILE = Path(__file__).parent.parent.parent / "settings.toml"


RELAY = '[[default.sites]]\ncarrier = "relay"\nrelay_password = "s3cret-s3cret-s3cret"'
"""The beginning of a site at the relay."""


def plain(value: Any) -> Any:
    """Settings as the file writes them."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def test_the_file_lists_every_key_with_its_default() -> None:
    with FILE.open("rb") as stream:
        listed = tomllib.load(stream)["default"]
    defaults = plain(Settings())
    assert defaults.pop("sites") == []  # [[default.sites]] is there as a comment
    assert listed == defaults


def test_the_file_itself_loads_as_the_defaults() -> None:
    assert load(FILE, {}) == Settings()


def test_each_line_with_a_key_of_a_section_is_explained_somewhere() -> None:
    """Every section has a comment, or follows one of the same keys."""
    sections = [line for line in FILE.read_text().splitlines() if line.startswith("[")]
    assert len(sections) == len(set(sections))


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "s.toml"
    file.write_text(text)
    return file


def refused(
    file: Path | None, environ: Mapping[str, str] | None = None, overrides: dict[str, Any] | None = None
) -> str:
    with pytest.raises(SettingsError) as caught:
        load(file, environ or {}, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[default.server]\nprot = 1", ["server.prot", "not a known key", "port"]),
        ("[default.sever]\nport = 1", ["sever", "not a known key", "server"]),
        ("[default.pulsar.status]\npoll_intervall = 1", ["pulsar.status.poll_intervall", "poll_interval"]),
        ("[default.server]\nport = 70000", ["server.port", "65535"]),
        ('[default.server]\nport = "many"', ["server.port"]),
        ("[default.pulsar.status]\npoll_interval = 0", ["pulsar.status.poll_interval", "0"]),
        ("[default.dispatch]\nlease = 0.1", ["dispatch.lease"]),
        ("[default.retry]\nmax_attempts = 101", ["retry.max_attempts", "100"]),
        ("[default.retry]\nbackoff = 0", ["retry.backoff", "0"]),
        ("[default.retry]\nbackoff = 301", ["retry.backoff", "300"]),
        ('[default.retry]\nfold = "maybe"', ["retry.fold"]),
        ('[default.logging]\nlevel = "LOUD"', ["logging.level", "DEBUG"]),
        ('[default.pulsar]\nfile_roots = ["data"]', ["pulsar.file_roots.0.path: must be an absolute path"]),
        ("[default.pulsar]\nfile_roots = [5]", ["pulsar.file_roots.0: must be a table"]),
        ("[default.pulsar]\nfile_roots = 5", ["pulsar.file_roots: must be a list"]),
        ('[default.pulsar]\nfile_roots = [{path = "/d", writable = true}]', ["file_roots.0.writable", "write"]),
        ('[[default.sites]]\ncarrier = "rest"', ["sites.0.name"]),
        ('[[default.sites]]\nname = "a b"\ncarrier = "rest"', ["sites.0.name: must be 1 to 64 of A-Z a-z 0-9 _ . -"]),
        ('[[default.sites]]\nname = "a"\ncarrier = "pigeon"', ["sites.0.carrier (a): "]),
        ('[[default.sites]]\nname = "a"\ncarrier = "rest"\nrul = "x"', ["sites.0.rul (a) is not a known key", "url"]),
        ('[[default.sites]]\nname = "a"\ncarrier = "rest"', ["sites.0.url (a): the carrier rest needs"]),
        ('[[default.sites]]\nname = "a"\ncarrier = "rest"\nurl = "h"', ["sites.0.url (a): must be http://"]),
        ('[[default.sites]]\nname = 1\ncarrier = "rest"\nurl = "h"', ["sites.0.url: must be"]),
        ("[default.basic_auth]\nenable = true", ["basic_auth.enable", "does not have that yet"]),
        ('[default.pulsar]\namqp_url = "http://h"', ["pulsar.amqp_url: must be amqp:// or amqps:// with a host"]),
        ('[default.pulsar]\namqp_url = "amqp://"', ["pulsar.amqp_url: must be"]),
        ('[default.pulsar]\namqp_url = "amqp://h:x"', ["pulsar.amqp_url: must be"]),
        ('[default.pulsar]\namqp_url = "amqp://h"\nurl = "http://h"', ["pulsar.amqp_url", "pulsar.url"]),
        (
            '[default.pulsar]\namqp_url = "amqp://h"\namqp_key_prefix = "a b"',
            ["pulsar.amqp_key_prefix: must be at most"],
        ),
        ('[default.pulsar]\namqp_url = "amqp://h"\n[default.dispatch]\nlease = 19', ["dispatch.lease", "20 seconds"]),
        ('[[default.sites]]\nname = "a"\ncarrier = "amqp"', ["sites.0.amqp_url"]),
        ('[[default.sites]]\nname = "a"\ncarrier = "relay"', ["sites.0.relay_password"]),
        (
            RELAY.replace("s3cret-s3cret-s3cret", "15-characters..") + '\nname = "a"',
            ["sites.0.relay_password", "at least 16"],
        ),
        (f'{RELAY}\nname = "a"\nrelay_topic_prefix = "a b"', ["sites.0.relay_topic_prefix (a): must be at most 64"]),
        (f'{RELAY}\nname = "a"\n[default.dispatch]\nlease = 19', ["dispatch.lease", "20 seconds"]),
        (f'{RELAY}\nname = "a"\nrelay_user = "u"\n{RELAY}\nname = "u"', ["sites.1.manager", "same user"]),
        (
            f'{RELAY}\nname = "a"\nrelay_user = "u"\n{RELAY}\nname = "b"\nrelay_user = "u"\nmanager = "_default_"',
            ["sites.1.manager"],
        ),
        (
            f'{RELAY}\nname = "u"\n{RELAY.replace("s3cret", "other")}\nname = "b"\nrelay_user = "u"\nmanager = "m"',
            ["sites.1.relay_password", "another password"],
        ),
        ("[default.server]\nroles = []", ["server.roles"]),
        ('[default.server]\nroles = ["api", "db"]', ["server.roles"]),
        ("[default\n", ["cannot be read"]),
        ('[default.server]\nport = "@int x"', []),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refused(written(tmp_path, text))
    assert message.startswith("settings: ")
    for word in words:
        assert word in message


def test_secrets_are_not_in_the_message(tmp_path: Path) -> None:
    file = written(tmp_path, '[default.pulsar]\nprivate_token = ["t0p-s3cret"]\n')
    assert "s3cret" not in refused(file)
    assert "s3cret" not in refused(written(tmp_path, '[default.pulsar]\namqp_url = "amq://u:s3cret@h"'))
    for text in ('amqp_url = "amqp://u:s3cret@h"\nurl = "http://h"', 'amqp_url = "amqp://u:s3cret@h:99999"'):
        assert "s3cret" not in refused(written(tmp_path, f"[default.pulsar]\n{text}\n"))
    assert "s3cret" not in refused(written(tmp_path, f'{RELAY}\nname = "a"\nmanager = 1\n{RELAY}\nname = "a"'))
    assert "s3cret" not in repr(load(written(tmp_path, f'{RELAY}\nname = "a"\n'), {}))
    assert "s3cret" not in repr(load(written(tmp_path, '[default.pulsar]\namqp_url = "amqp://u:s3cret@h"\n'), {}))
    secrets = {
        "TESP_PULSAR__URL": "https://u:s3cret@h",
        "TESP_PULSAR__PRIVATE_TOKEN": "s3cret",
        "TESP_DB__MONGODB_URI": "mongodb://u:s3cret@h",
        "TESP_BASIC_AUTH__PASSWORD": "s3cret",
    }
    assert "s3cret" not in repr(load(written(tmp_path, ""), secrets))


def test_profiles(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        '[default.server]\nport = 1\nhost = "h"\n[prod.server]\nport = 2\n[prod.logging]\nlevel = "ERROR"\n[dev]\n',
    )
    assert load(file, {}).server.port == 1
    for name in ("prod", "PROD"):
        settings = load(file, {"FASTAPI_PROFILE": name})
        assert (settings.server.port, settings.server.host, settings.logging.level) == (2, "h", "ERROR")
    assert load(file, {"FASTAPI_PROFILE": "dev"}) == load(file, {})
    assert load(file, {"FASTAPI_PROFILE": ""}) == load(file, {})
    assert "[nope]" in refused(file, {"FASTAPI_PROFILE": "nope"})
    assert refused(file, {"FASTAPI_PROFILE": "prod", "TESP_SERVER__PORT": "x"}).startswith("settings: server.port")


def test_a_mistake_in_a_profile_that_is_not_used_does_not_matter(tmp_path: Path) -> None:
    file = written(tmp_path, "[default.server]\nport = 1\n[other.server]\nprot = 2\n")
    assert load(file, {}).server.port == 1
    assert "server.prot" in refused(file, {"FASTAPI_PROFILE": "other"})


def test_variables(tmp_path: Path) -> None:
    file = written(tmp_path, "[default.server]\nport = 1\n")
    settings = load(
        file,
        {
            "TESP_SERVER__PORT": "8081",
            "TESP_SERVER__HIDE_CANCELING": "true",
            "TESP_EMBEDDED__FILE_ROOTS": '["/data", {path = "/ref", write = false}]',
            "TESP_PULSAR__URL": "http://p:8913",
            "TESP_PULSAR__STATUS__POLL_INTERVAL": "0.5",
            "TESP_SERVICE__NAME": "my service",
            "TESP_SERVER__DATA_DIR": "/var/lib/tesp",
            "TESP_SETTINGS_FILE": "/nowhere",
            "TESP_REQUIRE_SERVICES": "1",
            "UNRELATED": "x",
        },
    )
    assert settings.server.port == 8081
    assert settings.server.hide_canceling is True
    assert [(root.path, root.write) for root in settings.embedded.file_roots] == [("/data", True), ("/ref", False)]
    assert settings.pulsar.url == "http://p:8913"
    assert settings.pulsar.status.poll_interval == 0.5
    assert settings.service.name == "my service"
    assert settings.server.data_dir == Path("/var/lib/tesp")
    assert "server.prot" in refused(file, {"TESP_SERVER__PROT": "1"})
    assert "nonsense" in refused(file, {"TESP_NONSENSE": "1"})
    assert "server" in refused(file, {"TESP_SERVER": "x"})


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("", True),
        ("https://tes.example.org", True),
        ("http://[::1]:8080/behind/a/proxy/", True),
        ("tes.example.org", False),
        ("ftp://tes.example.org", False),
        ("https://user:hunter2@tes.example.org", False),
        ("https://tes.example.org/?a=b", False),
        ("https://tes.example.org/#a", False),
        ("https://tes.example.org/a b", False),
        ("https://t\u00e4s.example.org", False),
    ],
)
def test_the_address_for_reports(tmp_path: Path, url: str, good: bool) -> None:
    file = written(tmp_path, "[default.server]\n")
    if good:
        assert load(file, {"TESP_SERVER__PUBLIC_URL": url}).server.public_url == url
    else:
        message = refused(file, {"TESP_SERVER__PUBLIC_URL": url})
        assert "server.public_url" in message
        assert "hunter2" not in message


@pytest.mark.parametrize("token", ["12345678", "true", "0x10", "1e5", "[a", "{x=1}", "a b", "@none", "'q'", ""])
def test_text_that_looks_like_something_else_stays_text(token: str) -> None:
    """A token of digits is still a token."""
    assert load(FILE, {"TESP_PULSAR__PRIVATE_TOKEN": token}).pulsar.private_token == token


@pytest.mark.parametrize("token", ["12345678", "true", "[a", "env:B", " x "])
def test_secrets_come_from_variables(tmp_path: Path, token: str) -> None:
    text = '[default.pulsar]\nprivate_token = "env:A"\n[[default.sites]]\nname = "a"\ncarrier = "rest"\nurl = "env:U"\n'
    settings = load(written(tmp_path, text), {"A": token, "U": "https://u:p@h"})
    assert settings.pulsar.private_token == token
    assert settings.sites[0].url == "https://u:p@h"
    assert load(None, {"TESP_PULSAR__PRIVATE_TOKEN": "env:A", "A": token}).pulsar.private_token == token


def test_a_variable_that_is_not_there_is_named_with_its_key(tmp_path: Path) -> None:
    file = written(
        tmp_path, '[[default.sites]]\nname = "a"\ncarrier = "rest"\nurl = "http://h"\nprivate_token = "env:A"\n'
    )
    for environ in ({}, {"A": ""}):
        assert refused(file, environ) == "settings: sites.0.private_token (a): the variable A is not set, or empty"
    assert refused(None, {"TESP_PULSAR__PRIVATE_TOKEN": "env:A"}).endswith("(from TESP_PULSAR__PRIVATE_TOKEN)")


@pytest.mark.parametrize("text", ["env:", "env:N-S3CRET", "env: S3CRET", "env:S3CRET ", "env:1S3CRET", "env:S3CRET\\n"])
def test_what_looks_like_a_variable_is_never_the_value_itself(tmp_path: Path, text: str) -> None:
    message = refused(written(tmp_path, f'[default.pulsar]\nprivate_token = "{text}"\n'), {"S3CRET": "x"})
    assert message.startswith("settings: pulsar.private_token: what follows env: must be the name of a variable")
    assert "S3CRET" not in message
    message = refused(None, {"TESP_PULSAR__PRIVATE_TOKEN": text})
    assert message.endswith("(from TESP_PULSAR__PRIVATE_TOKEN)")
    assert "S3CRET" not in message


def test_what_a_variable_held_is_not_repeated(tmp_path: Path) -> None:
    file = written(tmp_path, '[[default.sites]]\nname = "a"\ncarrier = "rest"\nurl = "env:A"\n')
    assert "s3cret" not in refused(file, {"A": "htp://u:s3cret@h"})


def test_what_a_site_is_like(tmp_path: Path) -> None:
    text = """[[default.sites]]
        name = "a"
        carrier = "rest"
        url = "http://h"
        zones = "eu-1"
        labels = {GPU = "a100"}
        preemptible = true
        disk_gb = 100
        batch = true
        queues = ["long", "short.2"]
    """
    site = load(written(tmp_path, text), {}).sites[0]
    assert (site.zones, site.labels, site.preemptible) == (("eu-1",), {"gpu": "a100"}, True)
    assert (site.disk_gb, site.batch, site.queues) == (100.0, True, ("long", "short.2"))
    assert refused(written(tmp_path, text.replace('"long"', '"-x"'))).startswith(
        "settings: sites.0.queues.0 (a): must be"
    )
    assert refused(written(tmp_path, text.replace('"a100"', "1"))).startswith("settings: sites.0.labels.gpu (a): ")


def test_the_container_type_of_the_upstream() -> None:
    assert load(FILE, {"CONTAINER_TYPE": "bubblewrap"}).container.runtime == "bubblewrap"
    assert load(FILE, {"CONTAINER_TYPE": ""}).container.runtime == "auto"
    assert "container.runtime" in refused(FILE, {"CONTAINER_TYPE": "podman"})


def test_overrides_lie_over_everything() -> None:
    settings = load(FILE, {"TESP_SERVER__PORT": "1"}, {"server.port": 2, "server.host": "x"})
    assert (settings.server.port, settings.server.host) == (2, "x")
    assert "server.prot" in refused(FILE, {}, {"server.prot": 1})


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert str(missing) in refused(missing)
    assert str(missing) in refused(None, {"TESP_SETTINGS_FILE": str(missing)})
    file = written(tmp_path, "[default.server]\nport = 7\n")
    assert load(None, {"TESP_SETTINGS_FILE": str(file)}).server.port == 7


def test_no_file_at_all_means_the_defaults(tmp_path: Path) -> None:
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert load(None, {}) == Settings()
        (tmp_path / "settings.toml").write_text("[default.server]\nport = 9\n")
        assert load(None, {}).server.port == 9
    finally:
        os.chdir(here)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        Settings().server.port = 1  # type: ignore[misc]


# Settings outside a profile


@pytest.mark.parametrize("profile", ["default", "prod", "server"])
@pytest.mark.parametrize(
    ("text", "wrong", "right"),
    [
        ("[basic_auth]\nenable = true", "[basic_auth]", "[default.basic_auth]"),
        ("[server]\nport = 1", "[server]", "[default.server]"),
        ("[Server]\nport = 1", "[Server]", "[default.server]"),
        ("[pulsar.status]\nmax_polls = 1", "[pulsar]", "[default.pulsar]"),
        ('[[sites]]\nname = "a"\ncarrier = "local"', "[[sites]]", "[[default.sites]]"),
    ],
)
def test_a_section_without_its_profile_is_refused(
    tmp_path: Path, profile: str, text: str, wrong: str, right: str
) -> None:
    file = written(tmp_path, f"[prod.server]\nport = 2\n{text}\n")
    assert refused(file, {"FASTAPI_PROFILE": profile}) == f"settings: {wrong} in {file} must be {right}"


def test_a_key_outside_every_section_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, "port = 1\n[default.server]\n")
    assert refused(file).startswith(f"settings: port in {file} is in no section")


def test_the_local_file_beside_it_is_looked_at_too(tmp_path: Path) -> None:
    file = written(tmp_path, "[default.server]\nport = 1\n")
    local = tmp_path / "s.local.toml"
    local.write_text("[default.server]\nport = 2\n")
    assert load(file, {}).server.port == 2
    local.write_text("[basic_auth]\nenable = true\n")
    assert refused(file) == f"settings: [basic_auth] in {local} must be [default.basic_auth]"


# Values that cannot work


@pytest.mark.parametrize("key", ["pulsar.url", "service.organization_url", "service.documentation_url"])
@pytest.mark.parametrize(
    "url",
    ["notaurl", "ftp://h", "http://", "http:///x", "http://h:99999", "http://h:x", "http://[", "http://a b", "//h"],
)
def test_addresses_are_http_with_a_host(key: str, url: str) -> None:
    assert refused(FILE, {}, {key: url}) == f"settings: {key}: must be http:// or https:// with a host"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pulsar.url", "https://u:p@pulsar.example.org:8913/path"),
        ("pulsar.url", "http://[::1]:8913"),
        ("pulsar.url", ""),
        ("service.documentation_url", ""),
        ("service.contact_url", ""),
        ("service.contact_url", "mailto:a@example.org"),
        ("service.contact_url", "https://example.org/help"),
        ("container.docker_host", "unix:///run/docker.sock"),
        ("container.docker_host", "tcp://docker:2375"),
        ("container.docker_host", "tcp://[::1]:2375"),
    ],
)
def test_addresses_that_are_right(key: str, value: str) -> None:
    section, _, name = key.partition(".")
    assert getattr(getattr(load(FILE, {}, {key: value}), section), name) == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("service.organization_url", ""),
        ("service.contact_url", "a@example.org"),
        ("service.contact_url", "mailto:"),
        ("container.docker_host", "http://h:2375"),
        ("container.docker_host", "/var/run/docker.sock"),
        ("container.docker_host", "unix://run/docker.sock"),
        ("container.docker_host", "tcp://h"),
        ("container.docker_host", "tcp://h:70000"),
        ("container.docker_host", "ssh://h"),
    ],
)
def test_addresses_that_are_wrong(key: str, value: str) -> None:
    assert refused(FILE, {}, {key: value}).startswith(f"settings: {key}: must be ")


def test_an_address_that_is_wrong_is_not_repeated() -> None:
    assert "s3cret" not in refused(FILE, {"TESP_PULSAR__URL": "htp://u:s3cret@h"})


@pytest.mark.parametrize("rest", ["?private_token=s3cret", "/?private_token=s3cret", "/x#s3cret", "?", "#"])
def test_the_address_of_a_pulsar_has_no_query(tmp_path: Path, rest: str) -> None:
    url = f"http://u:s3cret@h{rest}"
    site = f'[[default.sites]]\nname = "a"\ncarrier = "rest"\nurl = "{url}"\n'
    for message in (refused(FILE, {"TESP_PULSAR__URL": url}), refused(written(tmp_path, site))):
        assert "url" in message
        assert "must have neither a query nor a fragment" in message
        assert "s3cret" not in message
    assert load(FILE, {"TESP_SERVICE__DOCUMENTATION_URL": "http://h/?a=b#c"}).service.documentation_url


@pytest.mark.parametrize(("key", "url"), [("url", "http://u:s3cret@h"), ("amqp_url", "amqp://u:s3cret@h")])
def test_a_pulsar_beside_sites_is_not_passed_over(tmp_path: Path, key: str, url: str) -> None:
    text = '[default.pulsar]\nurl = ""\namqp_url = ""\nmax_jobs = 1\n[[default.sites]]\nname = "a"\ncarrier = "local"\n'
    assert load(written(tmp_path, text), {}).sites
    message = refused(written(tmp_path, text.replace(f'\n{key} = ""', f'\n{key} = "{url}"')))
    assert message.startswith(f"settings: pulsar.{key}: with [[default.sites]] that Pulsar is not used")
    assert "s3cret" not in message
    assert refused(written(tmp_path, text), {f"TESP_PULSAR__{key.upper()}": url}).endswith(
        f"(from TESP_PULSAR__{key.upper()})"
    )


def test_a_rest_site_needs_its_address(tmp_path: Path) -> None:
    good = '[[default.sites]]\nname = "a"\ncarrier = "rest"\nurl = "http://h"\n'
    assert load(written(tmp_path, good), {}).sites[0].url == "http://h"
    file = written(tmp_path, good + '[[default.sites]]\nname = "b"\ncarrier = "rest"\n')
    assert refused(file).startswith("settings: sites.1.url (b): ")
    file = written(tmp_path, good.replace("http://h", "h"))
    assert refused(file).startswith("settings: sites.0.url (a): must be http://")


# Variables


def test_one_text_is_a_list_of_one(tmp_path: Path) -> None:
    settings = load(
        FILE,
        {
            "TESP_EMBEDDED__FILE_ROOTS": "/data",
            "TESP_SERVER__CORS_ORIGINS": "https://a.b",
            "TESP_SERVICE__STORAGE": "file:///data",
            "TESP_PULSAR__FILE_ROOTS": "",
        },
    )
    assert [root.path for root in settings.embedded.file_roots] == ["/data"]
    assert settings.server.cors_origins == ("https://a.b",)
    assert settings.service.storage == ("file:///data",)
    assert settings.pulsar.file_roots == ()
    file = written(tmp_path, '[default.server]\ncors_origins = "*"\n')
    assert load(file, {}).server.cors_origins == ("*",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("TESP_EMBEDDED__FILE_ROOTS", '["rel"]', "embedded.file_roots.0.path: must be an absolute path (from {})"),
        ("TESP_EMBEDDED__FILE_ROOTS", "rel", "embedded.file_roots.0.path: must be an absolute path (from {})"),
        ("TESP_EMBEDDED__FILE_ROOTS", "5", "embedded.file_roots: must be a list (from {})"),
        (
            "TESP_SERVER__CORS_ORIGINS",
            "https://a,https://b",
            'server.cors_origins: must be a list such as ["a", "b"] where there is a comma (from {})',
        ),
        ("TESP_SITES", "foo", "sites: must be a list (from {})"),
        ("TESP_SERVER", "foo", "server is a section, not a value (from {})"),
        ("TESP_EMBEDDED__STATUS", "5", "embedded.status is a section, not a value (from {})"),
        ("TESP_PORT", "1", "port is not a known key (from {}; do you mean TESP_SERVER__PORT?)"),
        ("TESP_SERVER_PORT", "1", "server_port is not a known key (from {}; do you mean TESP_SERVER__PORT?)"),
        ("TESP_SERVER__PROT", "1", "server.prot is not a known key (from {}; do you mean TESP_SERVER__PORT?)"),
        ("TESP_MAX_JOBS", "1", "max_jobs is not a known key (from {}; do you mean TESP_PULSAR__MAX_JOBS or TESP_EMBE"),
        ("TESP_NONSENSE", "1", "nonsense is not a known key (from {})"),
        ("TESP_SERVER__PORT", "@int x", "the value of {} cannot be read"),
        ("TESP_OAUTH__ENABLE", "true", "oauth.enable: this release does not have that yet; leave it unset (from {})"),
        ("TESP_PULSAR__URL", "h", "pulsar.url: must be http:// or https:// with a host (from {})"),
    ],
)
def test_the_variable_is_named(name: str, text: str, message: str) -> None:
    assert refused(FILE, {name: text}).startswith("settings: " + message.format(name))
    assert refused(FILE, {name: text}, {"server.host": "h"}).startswith("settings: " + message.format(name))


def test_the_variable_is_named_only_where_it_is_to_blame(tmp_path: Path) -> None:
    assert refused(FILE, {"CONTAINER_TYPE": "podman"}).endswith("(from CONTAINER_TYPE)")
    environ = {"TESP_SERVER__HOST": "h", "TESP_SERVER__PORT": "1"}
    assert "from" not in refused(FILE, environ, {"server.port": 70000})
    assert "from" not in refused(written(tmp_path, "[default.pulsar]\nmax_jobs = -1"), environ)
    assert refused(written(tmp_path, "[default]\nserver = 5"), environ) == "settings: server is a section, not a value"


def test_a_whole_section_and_one_of_its_keys_in_any_order() -> None:
    environ = {"TESP_SERVER__PORT": "2", "TESP_SERVER": '{port = 1, host = "h"}'}
    settings = load(None, environ)
    assert (settings.server.port, settings.server.host) == (2, "h")


# The data directory


def test_the_data_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "data"
    settings = load(FILE, {}, {"server.data_dir": directory})
    prepare_data_dir(settings)
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o750)
    (directory / "kept").touch()
    prepare_data_dir(settings)
    assert directory.stat().st_mode & 0o777 == 0o750
    assert [each.name for each in directory.iterdir()] == ["kept"]


@pytest.mark.parametrize("directory", ["/etc/passwd", "/etc/passwd/x", "/proc/nope", "/proc", "/dev/null", "/a\0b"])
def test_a_data_directory_that_cannot_be_used(directory: str) -> None:
    with pytest.raises(
        SettingsError, match=r"^settings: server\.data_dir: .*(is not a directory|cannot be written to)"
    ):
        prepare_data_dir(load(FILE, {}, {"server.data_dir": directory}))


def test_a_data_directory_of_somebody_else(tmp_path: Path) -> None:
    user = os.geteuid()
    tmp_path.chmod(0o500)
    if user == 0:  # root may write anywhere, so look with the eyes of nobody
        os.seteuid(65534)
    try:
        with pytest.raises(SettingsError, match="Permission denied"):
            prepare_data_dir(load(FILE, {}, {"server.data_dir": tmp_path}))
    finally:
        os.seteuid(user)


# docker-compose.yaml


def test_the_variables_of_the_compose_file_are_not_taken_for_settings() -> None:
    text = FILE.with_name("docker-compose.yaml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    assert used == {"HTTP_PORT", "FILES_DIR", "STAGING_DIR", "BASE_IMAGE", "MAX_JOBS", "PULSAR_TOKEN"}
    given = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))["services"]["tesp_api"]["environment"]
    settings = load(None, given)
    assert settings.pulsar.url == "http://pulsar:8913"
    assert [root.path for root in settings.pulsar.file_roots] == ["/srv/tesp"]


def test_two_managers_of_one_pulsar_are_two_sites_of_one_account(tmp_path: Path) -> None:
    text = f'{RELAY}\nname = "u"\n{RELAY}\nname = "big"\nrelay_user = "u"\nmanager = "big"'
    assert [each.relay_account for each in load(written(tmp_path, text), {}).sites] == ["u", "u"]


# docker/pulsar


PULSARS = FILE.parent / "docker" / "pulsar"


@pytest.mark.parametrize("name", ["server.ini", "amqp/app.yml", "relay/app.yml", "slurm/app.yml"])
def test_secrets_put_into_a_file_for_pulsar_do_not_end_up_in_its_comments(name: str) -> None:
    """Who replaces the placeholders does so everywhere in the file."""
    lines = (PULSARS / name).read_text().splitlines()
    assert re.search(r"@[A-Z_]+@", "\n".join(lines))
    assert not [line for line in lines if line.startswith("#") and re.search(r"@[A-Z_]+@", line)]
