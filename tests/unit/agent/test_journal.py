"""Journal: what activation has to remember survives crashes, broken files and clocks that are wrong."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from core.fleet_state import DesiredState, Position, Problem
from core.ids import AgentId, ModelName
from edge_agent.activation.journal import Journal
from edge_agent.activation.record import MAX_CRASHES, MAX_QUARANTINED, Quarantine, Record, Trial
from tests.support.clocks import HeldClock
from tests.support.variants import MadeVariant, made_variant

OLD, NEW, THIRD = (made_variant(version=version) for version in (1, 2, 3))
WHY = Problem("forbidden", "failed its self-test")


def journal(folder: Path) -> Journal:
    return Journal(folder / "journal", clock=HeldClock())


def desired(*variants: MadeVariant, generation: int = 1) -> DesiredState:
    slots = tuple(variant.slot for variant in variants)
    return DesiredState(AgentId("gate-1"), Position(1, generation), datetime(2026, 1, 2, tzinfo=UTC), slots)


def quarantine(variant: MadeVariant, *, fallback: MadeVariant | None = None, software: str = "1.0") -> Quarantine:
    since = datetime(2026, 1, 1, tzinfo=UTC)
    return Quarantine(variant.slot, WHY, since, software, None if fallback is None else fallback.slot)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "journal").iterdir())


def test_everything_in_the_record_survives_a_restart(tmp_path: Path) -> None:
    record = Record(
        desired(NEW, generation=2),
        desired(OLD),
        (Trial(NEW.slot, OLD.slot, 12.5, 40, 2, 1), Trial(THIRD.slot, None)),
        (quarantine(THIRD, fallback=OLD),),
        is_running=True,
    )
    journal(tmp_path).update(lambda _: record)
    assert journal(tmp_path).record == record


def test_a_new_agent_has_an_empty_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert journal(tmp_path).record == Record()
    assert not caplog.records


@pytest.mark.parametrize("kept_ratio", [0.0, 0.1, 0.5, 0.99])
def test_when_the_newest_file_is_cut_off_the_one_before_counts(tmp_path: Path, kept_ratio: float) -> None:
    first = journal(tmp_path)
    first.save_active(desired(OLD))
    first.save_active(desired(NEW, generation=2))
    newest = files(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[: int(newest.stat().st_size * kept_ratio)])
    assert journal(tmp_path).record.current == desired(OLD)


def test_the_file_that_is_broken_is_the_next_to_be_written(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.save_active(desired(OLD))
    first.save_active(desired(NEW, generation=2))
    files(tmp_path)[0].write_bytes(b"half")
    journal(tmp_path).save_active(desired(THIRD, generation=3))
    files(tmp_path)[1].write_bytes(b"half")
    assert journal(tmp_path).record.current == desired(THIRD, generation=3)


def test_a_flipped_bit_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal(tmp_path).save_active(desired(OLD))
    (file,) = files(tmp_path)
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    assert journal(tmp_path).record == Record()
    assert "both files of the journal are unreadable" in caplog.text


def test_saving_the_same_state_again_writes_nothing_and_keeps_the_previous_one(tmp_path: Path) -> None:
    found = journal(tmp_path)
    found.save_active(desired(OLD))
    found.save_active(desired(NEW, generation=2))
    before = [file.read_bytes() for file in files(tmp_path)]
    found.save_active(desired(NEW, generation=2))
    assert [file.read_bytes() for file in files(tmp_path)] == before
    assert found.record.previous == desired(OLD)


def test_a_state_with_another_position_is_another_state(tmp_path: Path) -> None:
    found = journal(tmp_path)
    found.save_active(desired(OLD))
    found.save_active(replace(desired(OLD), position=Position(2, 1)))
    assert journal(tmp_path).record.current == replace(desired(OLD), position=Position(2, 1))


def test_a_state_that_names_a_trial_no_longer_ends_it(tmp_path: Path) -> None:
    found = journal(tmp_path)
    found.update(lambda record: record.on_trial(Trial(NEW.slot, OLD.slot)))
    found.save_active(desired(THIRD))
    assert found.record.trials == ()


def test_a_start_after_a_clean_stop_is_no_crash(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.update(lambda record: record.on_trial(Trial(NEW.slot, OLD.slot)))
    first.note_start(software_version="1.0")
    first.note_clean_stop()
    assert journal(tmp_path).note_start(software_version="1.0").trials[0].crashes == 0


def test_crashes_are_counted_per_trial_whatever_the_clock_says(tmp_path: Path) -> None:
    journal(tmp_path).update(lambda record: record.on_trial(Trial(NEW.slot, OLD.slot)))
    for crashes in range(MAX_CRASHES):
        found = journal(tmp_path).note_start(software_version="1.0")
        assert [trial.crashes for trial in found.trials] == [crashes]
    found = journal(tmp_path).note_start(software_version="1.0")
    assert found.trials == ()
    (entry,) = found.quarantine
    assert (entry.slot, entry.fallback) == (NEW.slot, OLD.slot)
    assert "was on probation when the agent crashed, 3 times" in entry.problem.message


def test_another_version_of_the_software_may_try_again_what_failed(tmp_path: Path) -> None:
    found = journal(tmp_path)
    found.update(lambda record: record.quarantining(quarantine(NEW)))
    assert journal(tmp_path).note_start(software_version="1.0").quarantine
    assert not journal(tmp_path).note_start(software_version="1.1").quarantine


def test_what_was_rolled_back_and_is_still_in_force_goes_on_trial_again_when_it_is_released(tmp_path: Path) -> None:
    found = journal(tmp_path)
    found.save_active(desired(NEW))
    found.update(lambda record: record.quarantining(quarantine(NEW, fallback=OLD)))
    assert [entry.slot for entry in found.release(ModelName("digits"))] == [NEW.slot]
    assert found.record.trials == (Trial(NEW.slot, OLD.slot),)


def test_what_may_be_needed_is_pinned(tmp_path: Path) -> None:
    found = journal(tmp_path)
    found.save_active(desired(NEW))
    found.update(lambda record: record.quarantining(quarantine(NEW, fallback=OLD)))
    found.update(lambda record: record.quarantining(quarantine(THIRD)))
    assert found.record.pins() == {NEW.digest, OLD.digest}


def test_quarantine_is_bounded_and_forgets_the_oldest(tmp_path: Path) -> None:
    found = journal(tmp_path)
    many = [made_variant(version=version) for version in range(1, MAX_QUARANTINED + 2)]
    for variant in many:
        found.update(lambda record, variant=variant: record.quarantining(quarantine(variant)))  # type: ignore[misc]
    kept = [entry.slot for entry in found.record.quarantine]
    assert kept == [variant.slot for variant in many[1:]]


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    found = journal(tmp_path)
    found.save_active(desired(OLD))
    files(tmp_path)[0].parent.joinpath("journal.0").mkdir()
    with pytest.raises(OSError, match="directory"):
        found.save_active(desired(NEW, generation=2))
    assert found.record.current == desired(OLD)
    assert journal(tmp_path).record.current == desired(OLD)
