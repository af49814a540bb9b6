"""Settings: file, profiles, environment, and one clear line for what is wrong."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tesp_api.errors import SettingsError
from tesp_api.settings import Settings, load

FILE = Path(__file__).parent.parent.parent / "settings.toml"


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
        ('[default.logging]\nlevel = "LOUD"', ["logging.level", "DEBUG"]),
        ('[default.pulsar]\nfile_roots = ["data"]', ["pulsar.file_roots.0"]),
        ('[default.pulsar]\nfile_roots = [{path = "/d", writable = true}]', ["file_roots.0.writable", "write"]),
        ('[[default.sites]]\ncarrier = "rest"', ["sites.0.name"]),
        ('[[default.sites]]\nname = "a b"\ncarrier = "rest"', ["sites.0.name"]),
        ('[[default.sites]]\nname = "a"\ncarrier = "pigeon"', ["sites.0.carrier"]),
        ('[[default.sites]]\nname = "a"\ncarrier = "rest"\nrul = "x"', ["sites.0.rul", "url"]),
        ("[default.basic_auth]\nenable = true", ["basic_auth.enable", "does not have that yet"]),
        ('[default.db]\nmongodb_uri = "mongodb://u:p@h"', ["db.mongodb_uri"]),
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
    assert "s3cret" not in refused(written(tmp_path, '[default.db]\nmongodb_uri = "mongodb://u:s3cret@h"'))


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


@pytest.mark.parametrize("token", ["12345678", "true", "0x10", "1e5", "[a", "{x=1}", "a b", "@none", "'q'", ""])
def test_text_that_looks_like_something_else_stays_text(token: str) -> None:
    """A token of digits is still a token."""
    assert load(FILE, {"TESP_PULSAR__PRIVATE_TOKEN": token}).pulsar.private_token == token


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
