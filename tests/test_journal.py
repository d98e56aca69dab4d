"""The journal: what is appended is read back, half records are cut off, groups follow the rule, damage is named."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from finetune.memory.errors import UserError
from finetune.offload.noise.noise import Group, Update
from finetune.offload.perturb.journal import Journal, Record, combine

ABOUT = {"noise": "rademacher", "rank": 0, "group_steps": 3, "rounding": "exact", "seed": 1, "model": "m"}


def record(step: int, scale: float = 1.0) -> Record:
    return Record(step, 0.1, (Update(2**63 + step, 0.1 * step + 0.01), Update(step, -1.0)), scale, (float(step), 0.3))


@pytest.fixture
def journal(tmp_path) -> Journal:
    journal = Journal.create(tmp_path / "journal.zo", ABOUT)
    for step in range(7):
        journal.append(record(step))
    return journal


def test_read_back(journal):
    found = Journal.read(journal.path)
    assert found.about == ABOUT and found.steps == 7
    assert found.records == journal.records  # in fp32 both: a resumed run sees what the first one saw
    assert found.records[2].updates[0] == Update(2**63 + 2, float(np.float32(0.21)))
    assert os.stat(journal.path).st_mode & 0o777 == 0o600


def test_twenty_thousand_steps_are_under_two_megabytes(tmp_path):
    one = Record(0, 1e-6, (Update(2**64 - 1, 1e-7),), 1.0, (1.0,))
    assert 20_000 * len(one.pack()) < 2_000_000


@pytest.mark.parametrize("cut", [1, 4, 17, 40])
def test_a_half_written_record_does_not_count(journal, cut):
    journal.close()
    data = journal.path.read_bytes()
    journal.path.write_bytes(data[:-cut])
    assert Journal.read(journal.path).steps == 6 and Journal.read(journal.path).torn_bytes == len(record(6).pack()) - cut
    resumed = Journal.resume(journal.path)
    assert resumed.steps == 6
    resumed.append(record(6))
    assert journal.path.read_bytes() == data


@pytest.mark.parametrize("byte", [0, 4, 12, 16, 18, 25, 50])
def test_a_flipped_bit_is_noticed_and_nothing_is_cut_off(journal, byte):
    data = bytearray(journal.path.read_bytes())
    data[-3 * len(record(0).pack()) + byte] ^= 4
    journal.path.write_bytes(data)
    for opened in (Journal.read, Journal.resume):
        with pytest.raises(UserError, match="step 5 does not match its checksum"):
            opened(journal.path)
    assert journal.path.read_bytes() == data


def test_damage_of_several_records_is_noticed(journal):
    """Also what stands between whole records, and records that were cut out."""
    journal.close()
    data, size = journal.path.read_bytes(), len(record(0).pack())
    blank = data[: -4 * size] + b"\0" * 2 * size + data[-2 * size :]
    for changed in (blank, data[:-size] + b"#" + data[-size:], data[: -3 * size] + data[-size:]):
        journal.path.write_bytes(changed)
        with pytest.raises(UserError, match="is damaged: .*(whole ones behind it|step 5, found that of 7).*from a copy"):
            Journal.resume(journal.path)
        assert journal.path.read_bytes() == changed


def test_the_header_is_checked(journal):
    journal.close()
    data = journal.path.read_bytes()
    assert data.count(b'"group_steps": 3') == 1
    journal.path.write_bytes(data.replace(b'"group_steps": 3', b'"group_steps": 2'))
    with pytest.raises(UserError, match="header is damaged .its checksum does not fit.: bring it back from a copy"):
        Journal.read(journal.path)
    records = data[data.index(b"\n") :]
    journal.path.write_bytes(json.dumps(ABOUT).encode() + records)  # as before there were checksums
    assert Journal.read(journal.path).about == ABOUT and Journal.read(journal.path).steps == 7


def test_a_digest_is_of_the_run_and_of_its_first_steps(journal, tmp_path):
    other = Journal.create(tmp_path / "other", ABOUT | {"seed": 2})
    for step in range(7):
        other.append(record(step, scale=1.0 if step < 5 else 0.5))
    same = Journal(tmp_path / "none", dict(reversed(ABOUT.items())), journal.records[:4])
    assert same.digest(4) == journal.digest(4) == Journal.read(journal.path).digest(4)
    assert len({journal.digest(4), journal.digest(5), other.digest(4), other.digest(5)}) == 4
    other.about = ABOUT
    assert other.digest(5) == journal.digest(5) and other.digest(6) != journal.digest(6)


@pytest.mark.parametrize("data", [b"", b"{}\n", b"[1]\n", b"\xff\xfe", b'{"noise": "x"}\n'])
def test_what_is_no_journal(tmp_path, data):
    (tmp_path / "journal.zo").write_bytes(data)
    with pytest.raises(UserError, match="not the journal"):
        Journal.read(tmp_path / "journal.zo")


def test_missing(tmp_path):
    with pytest.raises(UserError, match="cannot read the journal"):
        Journal.read(tmp_path / "journal.zo")


def test_a_full_disk_leaves_no_half_record(journal, monkeypatch):
    real = os.write
    state = {"left": 11}

    def write(file: int, data) -> int:
        if state["left"] == 0:
            raise OSError(28, "No space left on device")
        count = real(file, bytes(data)[: state["left"]])
        state["left"] -= count
        return count

    before = journal.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(UserError, match="step 8 .*No space left"):
            journal.append(record(7))
    assert journal.path.read_bytes() == before and journal.steps == 7
    journal.append(record(7))
    assert Journal.read(journal.path).steps == 8


def test_one_writer_and_no_journal_is_overwritten(journal):
    with pytest.raises(UserError, match="in use by another process"):
        Journal.resume(journal.path)
    journal.close()
    with pytest.raises(UserError, match="File exists"):
        Journal.create(journal.path, ABOUT)
    assert Journal.read(journal.path).steps == 7
    assert [path.name for path in journal.path.parent.iterdir()] == ["journal.zo"]


def test_steps_follow_each_other(journal):
    with pytest.raises(ValueError, match="step 9 after 7"):
        journal.append(record(9))


def test_groups(journal):
    groups = journal.groups(0)
    assert [len(group.updates) for group in groups] == [6, 6, 2]
    assert groups[1].updates == tuple(update for r in journal.records[3:6] for update in r.updates)
    assert journal.groups(3, 5) == (combine(journal.records[3:5])._replace(shared_seed=journal.shared_seed(4)),)
    assert journal.shared_seed(3) == journal.shared_seed(5) != journal.shared_seed(6)
    assert journal.groups(3, 3) == ()
    with pytest.raises(ValueError, match="does not begin a group"):
        journal.groups(2)


def test_decay_scales_what_came_before_and_seeds_stand_once():
    first = Record(0, 0.1, (Update(5, 1.0), Update(6, 2.0)), 0.5)
    second = Record(1, 0.1, (Update(7, 3.0), Update(5, 4.0)), 0.25)
    # theta' = 0.25 (0.5 theta + z5 + 2 z6) + 3 z7 + 4 z5
    assert combine([first, second]) == Group(0.125, (Update(5, 4.25), Update(6, 0.5), Update(7, 3.0)))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_only_whole_groups_are_rounded(tmp_path, rounding):
    journal = Journal.create(tmp_path / "journal.zo", ABOUT | {"rounding": rounding})
    for step in range(5):
        journal.append(record(step))
    first, second = journal.groups(0)
    assert first.rounding == rounding and second.rounding == "exact"
    assert first.rounding_seed != Journal.create(tmp_path / "other", ABOUT | {"seed": 2})._rounding_seed(0)
