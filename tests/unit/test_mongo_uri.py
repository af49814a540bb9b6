"""What db.mongodb_uri may be; a wrong one is told in one line, without its password."""

from __future__ import annotations

import pytest

from tesp_api.errors import SettingsError
from tesp_api.store.mongo import MongoStore, check_uri

GOOD = [
    "mongodb://127.0.0.1",
    "mongodb://localhost:27017",
    "mongodb://db/tesp",
    "mongodb://user:p%40ss@db1,db2:27018,db3/tesp?replicaSet=rs0&tls=true&authSource=admin",
    "mongodb://user:pass@db/?tlsCAFile=%2Fdev%2Fnull&tls=true",
    "mongodb+srv://user:pass@cluster.example.org/tesp",
    "mongodb://[::1]:27017/tesp?timeoutMS=5000",
]

BAD = [
    "mongodb://user:s3cret@db/?tls=true&tlsCAFile=/no/such/file",
    "",
    "db:27017",
    "http://db",
    "mongodb://",
    "mongodb://user:s3cret@@db",
    "mongodb://user:s3cret@db:port",
    "mongodb://user:s3cret@db/tesp?noSuchOption=1&tls=perhaps",
    "mongodb://user:s3cret@db/te sp",
    "mongodb://user:s3cret@db/tesp.tasks",
]


@pytest.mark.parametrize("uri", GOOD)
def test_good(uri: str) -> None:
    check_uri(uri)
    MongoStore(uri)


@pytest.mark.parametrize("uri", BAD)
def test_bad(uri: str) -> None:
    with pytest.raises(SettingsError) as caught:
        MongoStore(uri)
    assert str(caught.value).startswith("settings: db.mongodb_uri ")
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)
