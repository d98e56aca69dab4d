"""The working store: what is committed survives power cuts at any moment, damage is noticed, nothing grows."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import pytest

from finetune.memory.errors import UserError
from finetune.offload.residency.io import IOEngine
from finetune.offload.update.store import StoredPiece, WorkingStore, read_manifest

PAGE = 4096


def write(store: WorkingStore, key, content: bytes) -> None:
    """A new version of a piece, as the optimizer's stream writes it; `content`: whole pages."""
    state_bytes = len(content) // 3 // PAGE * PAGE
    kept_bytes = len(content) - state_bytes
    offset, state_offset = store.place(key, kept_bytes, state_bytes)
    with open(store.path, "r+b") as file:
        os.pwrite(file.fileno(), content[:kept_bytes], offset)
        if state_bytes:
            os.pwrite(file.fileno(), content[kept_bytes:], state_offset)
    store.put(key, StoredPiece(offset, kept_bytes, 0, state_offset, state_bytes, 0, 0, 0, 1))


def content_of(path: Path, stored: StoredPiece) -> bytes:
    with open(path, "rb") as file:
        return b"".join(os.pread(file.fileno(), num_bytes, offset) for offset, num_bytes in stored.ranges)


class Recorder:
    """Every operation on the store's files, in order: ("data", offset, bytes), ("sync data"), ("text", bytes), ("sync text"),
    ("rename"), ("sync directory")."""

    def __init__(self, monkeypatch, directory: Path) -> None:
        self.operations: list[tuple] = []
        self._manifests: set[int] = set()
        real_write, real_fsync, real_rename, real_pwrite = os.write, os.fsync, os.rename, os.pwrite

        def record_write(descriptor, data):
            self.operations.append(("text", bytes(data)))
            return real_write(descriptor, data)

        def record_fsync(descriptor):
            is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            self.operations.append(("sync directory",) if is_directory else ("sync text",))
            real_fsync(descriptor)

        def record_rename(old, new):
            self.operations.append(("rename",))
            real_rename(old, new)

        def record_pwrite(descriptor, data, offset):
            self.operations.append(("data", offset, bytes(data)))
            return real_pwrite(descriptor, data, offset)

        for name, function in {
            "write": record_write, "fsync": record_fsync, "rename": record_rename, "pwrite": record_pwrite
        }.items():  # fmt: skip
            monkeypatch.setattr(os, name, function)

    def sync(self, file) -> None:
        self.operations.append(("sync data",))


class RecordedIO:
    def __init__(self, io: IOEngine, recorder: Recorder) -> None:
        self._io = io
        self.sync = recorder.sync

    def open(self, *args, **kwargs):
        return self._io.open(*args, **kwargs)


def after_power_cut(operations: list[tuple], directory: Path, chance: random.Random) -> None:
    """Leaves in `directory` what a disk may hold when the power fails after `operations`: what was not flushed is there, or
    not, page by page; a file that was renamed has its old name, or its new one."""
    directory.mkdir()
    data: dict[int, bytes] = {}
    unsynced: list[tuple[int, bytes]] = []
    manifest, text, text_synced = None, b"", False
    renamed: list[tuple[bytes, bool]] = []

    def settle(pages: list[tuple[int, bytes]], all_of_them: bool) -> None:
        for offset, content in pages:
            if all_of_them or chance.random() < 0.5:
                data[offset] = content

    for operation in operations:
        match operation:
            case ("data", offset, content):
                unsynced += [(offset + at, content[at : at + PAGE]) for at in range(0, len(content), PAGE)]
            case ("sync data",):
                settle(unsynced, True)
                unsynced = []
            case ("text", content):
                text, text_synced = (text if not text_synced and text else b"") + content, False
            case ("sync text",):
                text_synced = True
            case ("rename",):
                renamed.append((text, text_synced))
                text, text_synced = b"", False
            case ("sync directory",):
                manifest = renamed[-1]
                renamed = []
    settle(unsynced, False)
    if renamed and chance.random() < 0.5:
        manifest = renamed[-1]
    with open(directory / "data", "wb") as file:
        for offset, content in data.items():
            file.seek(offset)
            file.write(content)
        file.truncate(1 << 22)
    if manifest is not None:
        content, synced = manifest
        (directory / "manifest.json").write_bytes(content if synced else content[: chance.randrange(len(content))])


def test_power_may_fail_at_any_moment(tmp_path, monkeypatch):
    """Every prefix of the operations of seven steps, three times over: the last committed step is found, whole."""
    chance = random.Random(5)
    expected: list[dict] = [{}]
    committed_at = [0]
    with IOEngine("threads") as io:
        recorder = Recorder(monkeypatch, tmp_path)
        store = WorkingStore(tmp_path / "store", RecordedIO(io, recorder), {"run": 1})
        for step in range(1, 8):
            now = dict(expected[-1])
            for key in [("a", 0), ("a", 1), ("b", 0), ("c", 0)]:
                if chance.random() < 0.7:
                    now[key] = chance.randbytes(PAGE * chance.randint(1, 5))
                    write(store, key, now[key])
            store.commit(step, {"norm": step / 3})
            expected.append(now)
            committed_at.append(len(recorder.operations))
        operations = list(recorder.operations)
        store.close()
        monkeypatch.undo()
        seen = set()
        for length in range(len(operations) + 1):
            for attempt in range(3):
                directory = tmp_path / f"cut-{length}-{attempt}"
                after_power_cut(operations[:length], directory, chance)
                certain = max(step for step, at in enumerate(committed_at) if at <= length)
                reopened = WorkingStore(directory, io, {}, resume=True)
                assert reopened.step in (certain, certain + 1)
                assert reopened.pieces.keys() == expected[reopened.step].keys()
                for key, content in expected[reopened.step].items():
                    assert content_of(reopened.path, reopened.pieces[key]) == content
                if reopened.step:
                    assert reopened.notes == {"norm": reopened.step / 3} and reopened.about == {"run": 1}
                seen.add(reopened.step - certain)
                reopened.close()
        assert seen == {0, 1}


def test_two_versions_take_twice_the_room_however_many_steps(tmp_path):
    with IOEngine() as io:
        store = WorkingStore(tmp_path / "store", io, {})
        for step in range(1, 20):
            for index in range(5):
                write(store, ("unit", index), bytes([step]) * (3 * PAGE))
            store.commit(step, {})
        assert store.path.stat().st_size <= 4 * 5 * 3 * PAGE
        assert max(sum(place) for piece in store.pieces.values() for place in piece.ranges) <= 2 * 5 * 3 * PAGE
        store.close()


def test_one_version_is_written_in_place_and_refused_after_a_death_in_a_step(tmp_path):
    with IOEngine() as io:
        store = WorkingStore(tmp_path / "store", io, {}, versions=1)
        for step in (1, 2, 3):
            write(store, ("unit", 0), bytes([step]) * PAGE)
            store.commit(step, {})
            assert store.pieces["unit", 0].offset == 0
        store.close()
        store = WorkingStore(tmp_path / "store", io, {}, resume=True, versions=1)
        assert store.step == 3
        assert "Step 3 is the last committed one" in store.how_to_go_on
        write(store, ("unit", 0), bytes(PAGE))
        assert "begin again" in store.how_to_go_on
        store.close()  # killed in step 4
        with pytest.raises(UserError, match="mixture of two steps"):
            WorkingStore(tmp_path / "store", io, {}, resume=True, versions=1)


def test_dropped_state_frees_its_room_once_the_step_is_committed(tmp_path):
    with IOEngine() as io:
        store = WorkingStore(tmp_path / "store", io, {})
        assert store.place(("unit", 0), 2 * PAGE, 2 * PAGE) == (0, 2 * PAGE)
        store.put(("unit", 0), StoredPiece(0, PAGE, PAGE, 2 * PAGE, 2 * PAGE, 1, 2, 3, 7))
        store.commit(1, {})
        store.drop_state(("unit", 0))
        assert store.pieces["unit", 0] == StoredPiece(0, PAGE, PAGE, 0, 0, 1, 2, 0, 0)
        assert store.place(("unit", 1), 2 * PAGE, 0) == (4 * PAGE, 0)  # not yet
        store.commit(2, {})
        assert store.place(("unit", 2), 2 * PAGE, 0) == (2 * PAGE, 0)
        store.close()


def test_a_second_process_is_refused(tmp_path):
    with IOEngine() as io:
        store = WorkingStore(tmp_path / "store", io, {})
        with pytest.raises(UserError, match="open in another process"):
            WorkingStore(tmp_path / "store", io, {})
        store.close()
        WorkingStore(tmp_path / "store", io, {}).close()


def test_a_run_is_not_begun_over_another(tmp_path):
    with IOEngine() as io:
        store = WorkingStore(tmp_path / "store", io, {})
        write(store, ("unit", 0), bytes(PAGE))
        store.commit(1, {})
        store.close()
        with pytest.raises(UserError, match="holds a run of 1 steps"):
            WorkingStore(tmp_path / "store", io, {})


@pytest.mark.parametrize("position", [0, 40, -5])
def test_a_damaged_manifest_is_refused(tmp_path, position):
    with IOEngine() as io:
        store = WorkingStore(tmp_path / "store", io, {})
        store.commit(1, {})
        store.close()
        path = tmp_path / "store" / "manifest.json"
        content = bytearray(path.read_bytes())
        content[position] ^= 4
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            WorkingStore(tmp_path / "store", io, {}, resume=True)


def test_truncated_data_is_refused(tmp_path):
    with IOEngine() as io:
        store = WorkingStore(tmp_path / "store", io, {})
        write(store, ("unit", 0), bytes(3 * PAGE))
        store.commit(1, {})
        store.close()
        os.truncate(tmp_path / "store" / "data", PAGE)
        with pytest.raises(UserError, match="truncated"):
            WorkingStore(tmp_path / "store", io, {}, resume=True)


def test_a_full_disk_leaves_the_committed_step(tmp_path, monkeypatch):
    with IOEngine() as io:
        store = WorkingStore(tmp_path / "store", io, {})
        write(store, ("unit", 0), bytes(PAGE))
        store.commit(1, {})

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match="No space left on device. Make room, or mend it. Step 1 is the last committed one"):
            for index in range(8):
                write(store, ("unit", index), bytes(PAGE))
        store.close()
        assert read_manifest(tmp_path / "store")["step"] == 1


def test_a_disk_with_just_enough_room_is_enough(tmp_path, monkeypatch):
    real, limit = os.posix_fallocate, 11 * PAGE

    def nearly_full(file, offset, num_bytes):
        if offset + num_bytes > limit:
            raise OSError(28, "No space left on device")
        real(file, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", nearly_full)
    with IOEngine() as io:
        store = WorkingStore(tmp_path / "store", io, {})
        for index in range(11):
            write(store, ("unit", index), bytes([index]) * PAGE)
        store.commit(1, {})
        assert store.path.stat().st_size == limit
        with pytest.raises(UserError, match="No space left on device"):
            write(store, ("unit", 11), bytes(PAGE))
        store.close()


def test_files_are_private(tmp_path):
    with IOEngine() as io:
        store = WorkingStore(tmp_path / "store", io, {})
        write(store, ("unit", 0), bytes(PAGE))
        store.commit(1, {})
        store.close()
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "store").iterdir()} == {"0o600"}
    assert oct((tmp_path / "store").stat().st_mode & 0o777) == "0o700"
