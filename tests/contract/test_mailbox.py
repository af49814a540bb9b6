"""What every mailbox must do; each store of test_store has one."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from tesp_api.errors import MailboxFull, StoreUnavailable
from tesp_api.store import sqlite as sqlite_store
from tesp_api.store.mailbox import BOX_LETTERS, LETTER_BYTES, READ_BYTES, Mailbox, rung
from tesp_api.store.mongo import MongoStore
from tesp_api.store.sqlite import SqliteStore
from tests import mongod
from tests.contract.test_store import STORES, Spy

Open = Callable[[], Any]

SHARED = [kind for kind in STORES if kind != "sqlite-memory"]


@pytest.fixture(params=STORES)
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    with STORES[request.param](tmp_path) as opened:
        yield opened


@pytest.fixture(params=SHARED)
def open_shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    with STORES[request.param](tmp_path) as opened:
        yield opened


def on(test: Callable[[Mailbox], Coroutine[Any, Any, None]]) -> Callable[[Open], None]:
    """Run an async test on the mailbox of an open store."""

    def run(open_store: Open) -> None:
        async def main() -> None:
            async with open_store() as store:
                await test(store.mail)

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def texts(mail: Mailbox, box: str) -> list[str]:
    """All letters of a box, read by read."""
    found: list[str] = []
    after = 0
    while letters := await mail.read(box, after):
        assert [each.id for each in letters] == sorted({each.id for each in letters})
        assert letters[0].id > after
        found += [each.text for each in letters]
        after = letters[-1].id
    return found


@on
async def test_letters_come_back_in_order_and_stay(mail: Mailbox) -> None:
    ids = [await mail.put("a", str(n), f"k{n}") for n in range(5)]
    await mail.put("b", "other", "k0")
    assert ids == sorted(set(ids))
    assert ids[0] > 0
    for _ in range(2):
        assert await texts(mail, "a") == ["0", "1", "2", "3", "4"]
    assert [each.id for each in await mail.read("a", ids[1])] == ids[2:]
    assert await mail.read("a", ids[-1]) == []
    assert await texts(mail, "b") == ["other"]
    assert await texts(mail, "nobody's") == []


@on
async def test_dropped_letters_are_gone_and_their_ids_do_not_come_back(mail: Mailbox) -> None:
    ids = [await mail.put("a", str(n), str(n)) for n in range(4)]
    await mail.put("b", "stays", "x")
    await mail.drop("a", ids[1])
    assert await texts(mail, "a") == ["2", "3"]
    await mail.drop("a", ids[3])
    await mail.drop("a", ids[3])
    assert await texts(mail, "a") == []
    assert await mail.put("a", "new", "0") > ids[3]
    await mail.drop("nobody's", 5)
    assert await texts(mail, "b") == ["stays"]


@pytest.mark.parametrize("kind", STORES)
def test_a_new_store_goes_on_above_the_ids_of_the_old_one(kind: str, tmp_path: Path) -> None:
    """Who remembers what it read from a store that is gone, misses nothing of the one in its place."""

    async def put(name: str, count: int) -> list[int]:
        (tmp_path / name).mkdir()
        with STORES[kind](tmp_path / name) as opened:
            async with opened() as store:
                return [await store.mail.put("a", str(number), str(number)) for number in range(count)]

    old = asyncio.run(put("old", 30))
    new = asyncio.run(put("new", 1))
    assert new[0] > old[-1]


@on
async def test_a_key_is_put_once(mail: Mailbox) -> None:
    first = await mail.put("a", "first", "k")
    await mail.put("a", "second", "l")
    assert await mail.put("a", "again", "k") == first
    assert await texts(mail, "a") == ["first", "second"]
    ids = await asyncio.gather(*(mail.put("a", f"many {n}", "m") for n in range(20)))
    assert len(set(ids)) == 1
    assert len(await texts(mail, "a")) == 3


@on
async def test_a_letter_may_take_the_place_of_an_older_one(mail: Mailbox) -> None:
    first = await mail.put("a", "old", "k", instead=True)
    last = await mail.put("a", "between", "l")
    assert await mail.put("a", "new", "k", instead=True) > last > first
    assert await texts(mail, "a") == ["between", "new"]
    await asyncio.gather(*(mail.put("a", f"many {n}", "k", instead=True) for n in range(20)))
    assert len(await texts(mail, "a")) == 2


@on
async def test_odd_boxes_keys_and_texts(mail: Mailbox) -> None:
    for odd in ("", "a.b", "$x", "' OR 1=1 --", "é😀", "x" * 5000, "a/b", "%"):
        await mail.put(f"box {odd}", odd, odd)
        await mail.put(f"box {odd}", odd, odd, instead=True)
        assert await texts(mail, f"box {odd}") == [odd]
        await mail.drop(f"box {odd}", 1 << 60)
    with pytest.raises(ValueError, match=r".+"):
        await mail.put("a", "\ud800", "k")
    with pytest.raises(ValueError, match="too long"):
        await mail.put("a", "x" * (LETTER_BYTES + 1), "k")
    assert await texts(mail, "a") == []


@on
async def test_long_letters_come_a_few_at_a_time(mail: Mailbox) -> None:
    long = "é" * (5 << 20)
    await mail.put("a", "short", "0")
    await mail.put("a", long, "1")
    await mail.put("a", long, "2")
    await mail.put("a", "end", "3")
    assert [len(each.text) for each in await mail.read("a")] == [5]
    assert await texts(mail, "a") == ["short", long, long, "end"]
    for number in range(10):
        await mail.put("b", "x" * (READ_BYTES // 4), str(number))
    assert len(await mail.read("b")) == 4


@on
async def test_a_full_box_says_so_and_the_others_go_on(mail: Mailbox) -> None:
    for start in range(0, BOX_LETTERS, 50):
        await asyncio.gather(*(mail.put("a", str(n), str(n)) for n in range(start, min(start + 50, BOX_LETTERS))))
    with pytest.raises(MailboxFull):
        await mail.put("a", "too many", "new")
    assert await mail.put("a", "known", "7") > 0
    await mail.put("b", "has room", "new")
    first = (await mail.read("a"))[0]
    await mail.drop("a", first.id)
    await mail.put("a", "fits", "new")
    found = await texts(mail, "a")
    assert (len(found), found[-1]) == (BOX_LETTERS, "fits")


@on
async def test_a_box_of_long_letters_is_full_soon(mail: Mailbox) -> None:
    long = "x" * LETTER_BYTES
    for number in range(4):
        await mail.put("a", long, str(number))
    with pytest.raises(MailboxFull):
        await mail.put("a", "one more", "k")


def test_old_letters_go(open_store: Open) -> None:
    async def main() -> None:
        async with open_store() as store:
            for box in ("a", "b"):
                await store.mail.put(box, "old", "k")
            await store.mail.expire(store.clock() - 3600)
            assert await texts(store.mail, "a") == ["old"]
            await store.mail.expire(store.clock() + 3600)
            assert await texts(store.mail, "a") == await texts(store.mail, "b") == []
            await store.mail.put("a", "new", "k")
            assert await texts(store.mail, "a") == ["new"]

    asyncio.run(main())


@on
async def test_the_doorbell_rings_for_its_box(mail: Mailbox) -> None:
    with mail.doorbell.listen("a") as ours, mail.doorbell.listen("b") as other:
        await mail.put("a", "x", "k")
        assert ours.is_set()
        assert not other.is_set()
        ours.clear()
        waiting = asyncio.create_task(rung(ours, 60))
        await asyncio.sleep(0)
        await mail.put("a", "y", "l")
        await waiting
        await rung(other, 0)
    await mail.put("a", "nobody listens", "m")


def test_letters_outlive_their_process(open_shared: Open) -> None:
    async def write() -> int:
        async with open_shared() as store:
            await store.mail.put("a", "dropped", "j")
            number: int = await store.mail.put("a", "stays", "k")
            await store.mail.drop("a", number - 1)
            return number

    async def read(number: int) -> None:
        async with open_shared() as store:
            assert [(each.id, each.text) for each in await store.mail.read("a")] == [(number, "stays")]
            await store.mail.drop("a", number)

    async def go_on(number: int) -> None:
        async with open_shared() as store:
            assert await store.mail.put("a", "later", "k") > number

    number = asyncio.run(write())
    asyncio.run(read(number))
    asyncio.run(go_on(number))


def test_a_reader_misses_nothing_of_several_writers(open_shared: Open) -> None:
    """A letter that showed up below an id that was read already would be lost."""

    async def write(store: Any, name: str) -> None:
        for number in range(30):
            await store.mail.put("a", f"{name} {number}", f"{name} {number}")

    async def read(store: Any, count: int) -> list[str]:
        found: list[str] = []
        after = 0
        async with asyncio.timeout(120):
            while len(found) < count:
                for each in await store.mail.read("a", after):
                    found.append(each.text)
                    after = each.id
                await store.mail.drop("a", after)
        return found

    async def main() -> None:
        async with open_shared() as one, open_shared() as two:
            reading = asyncio.create_task(read(two, 120))
            await asyncio.gather(*(write(store, f"{at}{n}") for at, store in enumerate((one, two)) for n in range(2)))
            found = await reading
            assert len(set(found)) == len(found) == 120
            assert [each for each in found if each.startswith("00 ")] == [f"00 {number}" for number in range(30)]

    asyncio.run(main())


def test_a_closed_mailbox_says_so(open_store: Open) -> None:
    async def main() -> None:
        store = open_store()
        with pytest.raises(StoreUnavailable):
            await store.mail.put("a", "x", "k")
        with pytest.raises(StoreUnavailable):
            await store.mail.read("a")

    asyncio.run(main())


# SQLite


def test_a_file_without_letters_is_migrated(tmp_path: Path) -> None:
    file = tmp_path / "tasks.sqlite"
    db = sqlite3.connect(file, isolation_level=None)
    at = next(n for n, each in enumerate(sqlite_store.MIGRATIONS) if "CREATE TABLE letter" in each)
    sqlite_store._migrate(db, sqlite_store.MIGRATIONS[:at])
    db.close()

    async def main() -> None:
        async with SqliteStore(file) as store:
            await store.mail.put("a", "x", "k")
            assert await texts(store.mail, "a") == ["x"]

    asyncio.run(main())


def test_every_look_for_letters_uses_an_index() -> None:
    db = sqlite3.connect(":memory:", isolation_level=None)
    sqlite_store._migrate(db)
    spy: Any = Spy(db)
    sqlite_store._put_letter(spy, "a", "x", 1, "k", False)
    sqlite_store._put_letter(spy, "a", "x", 1, "k", True)
    sqlite_store._read_letters(spy, "a", 0)
    sqlite_store._drop_letters(spy, "a", 1)
    sqlite_store._expire_letters(spy, 1.0)
    for sql, steps in spy.plans():
        for step in steps:
            assert not step.startswith("SCAN letter"), (sql, steps)
            assert "TEMP B-TREE" not in step, (sql, steps)
    db.close()


# MongoDB


def test_texts_of_letters_do_not_pile_up() -> None:
    with mongod.database("standalone") as uri, MongoClient[Any](uri) as client:
        database = client.get_default_database()

        async def main() -> None:
            async with MongoStore(uri) as store:
                mail = store.mail
                await mail.put("a", "x" * (9 << 20), "k")
                assert database.letter.count_documents({}) == 3
                await mail.put("a", "new", "k", instead=True)
                await mail.put("a", "again", "k")
                assert database.letter.count_documents({}) == 1
                await mail.drop("a", 1 << 60)
                assert database.letter.count_documents({}) == 0
                database.letter.insert_one({"_id": "left over/000", "written": 1.0, "data": b""})
                await mail.expire(2.0)
                assert database.letter.count_documents({}) == 0
                assert {"_id_", "written"} == set(database.letter.index_information())

        asyncio.run(main())
