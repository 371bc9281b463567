"""Faults D08 to D10 and D12 to D18 of delivery.md: whatever happens while a model is brought into force, one serves."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.digest import Digest, hex_of
from core.errors import Untrusted
from core.fleet_state import NOWHERE, Position, PushResult, Slot, SlotPhase
from core.ids import ModelName
from core.manifest import Manifest
from edge_agent.activation.probation import ProbationTerms
from edge_agent.activation.record import MAX_CRASHES
from edge_agent.runtime.vitals import Vitals
from protos.artifacts.v1 import artifacts_pb2 as pb
from tests.support.delivery_shelf import Sent, Silence
from tests.support.device import FAULTY, LOOK_S, SOUND, Device, desired, phases, report_of, stored_bytes, until
from tests.support.variants import made_variant

OLD, NEW, THIRD = (made_variant(version=version) for version in (1, 2, 3))
OTHER = made_variant(model="faces")


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path, OLD, NEW, THIRD, OTHER)


@pytest.mark.parametrize("scenario", ["update", "rollback"])
def test_D08_a_power_cut_at_any_change_of_the_disk_leaves_the_old_or_the_new_version_whole(
    tmp_path: Path, scenario: str
) -> None:
    # In a process without other threads, which may fork.
    command = [sys.executable, "-m", "tests.support.crash_points", str(tmp_path), scenario]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) > 30, "expected many points at which it can crash"


async def test_D08_a_restart_while_a_model_is_on_probation_goes_on_with_it_and_with_what_was_seen(
    device: Device,
) -> None:
    await device.apply(desired(OLD, generation=1))
    async with device.running(crashing=True) as reconciler:
        await reconciler.submit(desired(NEW, generation=2))
    async with device.running() as reconciler:
        await reconciler.restored.wait()
        assert device.runs(NEW)
        assert report_of(reconciler, NEW).phase is SlotPhase.PROBATION
        (trial,) = device.journal().record.trials
        assert (trial.slot, trial.previous, trial.crashes) == (NEW.slot, OLD.slot, 1)


async def test_D09_a_state_that_cannot_be_written_down_is_not_applied(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    async with device.running() as reconciler:
        await reconciler.restored.wait()
        broken = [device.root / "journal" / name for name in ("journal.0", "journal.1")]
        for file in broken:
            file.unlink()
            file.mkdir()
        result = await reconciler.submit(desired(NEW, generation=2))
        assert result.problem is not None
        assert "disk" in result.problem.message
        assert device.runs(OLD)
        assert reconciler.applied == Position(1, 1)
        for file in broken:
            file.rmdir()
        assert await reconciler.submit(desired(NEW, generation=2)) == PushResult(Position(1, 2))


def lose_the_journal(device: Device) -> None:
    for file in (device.root / "journal").iterdir():
        file.write_bytes(b"\x00" * file.stat().st_size)


async def test_D10_with_the_journal_lost_what_the_store_has_serves_without_anybody_and_the_next_push_decides(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    await device.apply(desired(OLD, OTHER, generation=1))
    lose_the_journal(device)
    device.shelf.asked.clear()
    device.shelf.asked_manifests.clear()
    async with device.running() as reconciler:
        await device.host.until(lambda: device.runs(OLD, OTHER))
        assert "the journal was lost" in caplog.text
        assert reconciler.applied == NOWHERE
        assert await reconciler.submit(desired(OLD, OTHER, generation=1)) == PushResult(Position(1, 1))
        assert device.runs(OLD, OTHER)
        assert (device.shelf.asked, device.shelf.asked_manifests) == ([], [])


async def test_D10_with_the_journal_lost_the_newest_version_serves_and_the_one_before_it_is_at_hand(
    device: Device,
) -> None:
    await device.apply(desired(OLD, generation=1))
    await device.apply(desired(NEW, generation=2))
    lose_the_journal(device)
    async with device.running():
        await device.host.until(lambda: device.runs(NEW))
        device.see(FAULTY)
        await device.host.until(lambda: device.runs(OLD))


async def test_D10_with_the_journal_lost_a_variant_is_tried_again_before_it_serves(device: Device) -> None:
    await device.apply(desired(OLD, OTHER, generation=1))
    lose_the_journal(device)
    device.tester.failures["digits", 1] = "failed its self-test: other answers"
    async with device.running() as reconciler:
        await device.host.until(lambda: device.runs(OTHER))
        await until(reconciler, lambda: SlotPhase.FAILED in phases(reconciler))
        assert device.host.loads == [OTHER.digest]


async def test_D10_with_the_journal_lost_what_rotted_meanwhile_is_not_served(device: Device) -> None:
    await device.apply(desired(OLD, OTHER, generation=1))
    lose_the_journal(device)
    blob = device.root / "store" / "blobs" / hex_of(Digest(OLD.manifest.files[0].digest))
    blob.write_bytes(b"x" * blob.stat().st_size)
    async with device.running():
        await device.host.until(lambda: device.runs(OTHER))
        assert device.host.loads == [OTHER.digest]


async def test_D10_a_journal_that_is_missing_is_rebuilt_too(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    for file in (device.root / "journal").iterdir():
        file.unlink()
    async with device.running():
        await device.host.until(lambda: device.runs(OLD))


async def test_D10_one_broken_file_of_the_journal_is_no_loss(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    newest = max((device.root / "journal").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(b"half")
    async with device.running() as reconciler:
        await reconciler.restored.wait()
        assert device.runs(OLD)


async def test_D12_a_model_that_keeps_the_agent_from_reporting_is_rolled_back_and_then_reported(tmp_path: Path) -> None:
    device = Device(tmp_path, OLD, NEW, terms=ProbationTerms(duration_s=3600, max_stalls=2, stall_s=0.01))
    await device.apply(desired(OLD, generation=1))
    async with device.running() as reconciler:
        await reconciler.submit(desired(NEW, generation=2))
        while not device.runs(OLD):
            # The model holds the loop: nothing else, so no report either, can happen meanwhile.
            time.sleep(0.01 + 2 * LOOK_S)
            await asyncio.sleep(0)
        await until(reconciler, lambda: report_of(reconciler, NEW).problem is not None)
        assert report_of(reconciler, NEW).phase is SlotPhase.FAILED


async def test_D12_a_model_is_rolled_back_without_anybody_to_report_to(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    async with device.running() as reconciler:
        await reconciler.submit(desired(NEW, generation=2))
        device.shelf.drop(OLD)
        device.see(FAULTY)
        await device.host.until(lambda: device.runs(OLD))
        report = report_of(reconciler, NEW)
        assert report.phase is SlotPhase.FAILED
        assert report.problem is not None
        assert "digits 2 (int8) failed its probation: expected at most" in report.problem.message
        assert "nanofleet-agent retry digits" in report.problem.message
        await until(reconciler, lambda: "; version 1 (int8) runs" in str(report_of(reconciler, NEW).problem))


async def test_D13_what_failed_its_self_test_is_neither_fetched_nor_tried_again(device: Device) -> None:
    device.tester.failures["digits", 2] = "failed its self-test: other answers"
    await device.apply(desired(OLD, generation=1))
    for generation in (2, 3):
        async with device.running() as reconciler:
            result = await reconciler.submit(desired(NEW, generation=generation))
            assert result.problem is not None
            assert "other answers" in result.problem.message
            reconciler.retry_failed()
            assert device.runs(OLD)
            assert report_of(reconciler, NEW).phase is SlotPhase.FAILED
    assert device.tester.tested.count("digits 2") == 1
    assert len([asked for asked in device.shelf.asked if asked.manifest == NEW.digest]) == 1


async def test_D13_what_failed_its_probation_is_not_loaded_again_after_a_restart(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    async with device.running() as reconciler:
        await reconciler.submit(desired(NEW, generation=2))
        device.see(FAULTY)
        await device.host.until(lambda: device.runs(OLD))
    async with device.running() as reconciler:
        await reconciler.restored.wait()
        assert device.host.loads == [OLD.digest]
        await until(reconciler, lambda: phases(reconciler) == {SlotPhase.FAILED})
        assert reconciler.applied == Position(1, 2)


async def test_D13_a_persons_word_lets_it_be_tried_again(device: Device) -> None:
    device.tester.failures["digits", 2] = "failed its self-test: other answers"
    async with device.running() as reconciler:
        assert (await reconciler.submit(desired(NEW, generation=1))).problem is not None
    device.tester.failures.clear()
    # As `nanofleet-agent retry` does it.
    assert device.journal().release(ModelName("digits"))
    async with device.running() as reconciler:
        assert await reconciler.submit(desired(NEW, generation=1)) == PushResult(Position(1, 1))
        assert device.runs(NEW)


async def test_D13_new_software_lets_it_be_tried_again_with_what_ran_before_at_hand(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    async with device.running() as reconciler:
        await reconciler.submit(desired(NEW, generation=2))
        device.see(FAULTY)
        await device.host.until(lambda: device.runs(OLD))
    device.software_version = "1.1"
    async with device.running() as reconciler:
        await device.host.until(lambda: device.runs(NEW))
        device.see(FAULTY)
        await device.host.until(lambda: device.runs(OLD))


async def test_D13_another_version_of_the_model_is_installed_over_what_failed(device: Device) -> None:
    device.tester.failures["digits", 2] = "failed its self-test: other answers"
    await device.apply(desired(OLD, generation=1))
    async with device.running() as reconciler:
        assert (await reconciler.submit(desired(NEW, generation=2))).problem is not None
        assert await reconciler.submit(desired(THIRD, generation=3)) == PushResult(Position(1, 3))
        assert device.runs(THIRD)


async def test_D13_naming_a_failed_version_again_does_not_bring_back_what_ran_before_it(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    async with device.running() as reconciler:
        await reconciler.submit(desired(NEW, generation=2))
        device.see(FAULTY)
        await device.host.until(lambda: device.runs(OLD))
        await reconciler.submit(desired(THIRD, generation=3))
        assert (await reconciler.submit(desired(NEW, generation=4))).problem is not None
        assert device.runs(THIRD)


async def test_D14_three_crashes_on_probation_bring_back_the_old_model_at_the_next_start(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    async with device.running(crashing=True) as reconciler:
        await reconciler.submit(desired(NEW, generation=2))
    for _ in range(MAX_CRASHES - 1):
        async with device.running(crashing=True) as reconciler:
            await reconciler.restored.wait()
            assert device.runs(NEW)
    async with device.running() as reconciler:
        await reconciler.restored.wait()
        assert device.host.loads == [OLD.digest]
        await until(reconciler, lambda: phases(reconciler) == {SlotPhase.FAILED})


async def test_D14_crashes_while_it_is_loaded_count_too(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    for _ in range(MAX_CRASHES):
        async with device.running(crashing=True) as reconciler:
            await reconciler.restored.wait()
            device.host.gate = asyncio.Event()
            device.host.entered.clear()
            reconciler.submit(desired(NEW, generation=2))
            await device.host.entered.wait()
    async with device.running() as reconciler:
        await reconciler.restored.wait()
        assert (await reconciler.submit(desired(NEW, generation=2))).problem is not None
        assert device.host.loads == [OLD.digest]


async def test_D14_crashes_after_the_commit_are_not_the_models(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    for _ in range(MAX_CRASHES + 1):
        async with device.running(crashing=True) as reconciler:
            await reconciler.restored.wait()
            assert device.runs(OLD)


async def test_D14_a_first_model_that_fails_its_probation_is_taken_away(device: Device) -> None:
    async with device.running() as reconciler:
        await reconciler.submit(desired(NEW, generation=1))
        device.see(FAULTY)
        await device.host.until(device.runs)
        assert report_of(reconciler, NEW).phase is SlotPhase.FAILED


async def test_D15_a_commit_whose_report_is_lost_stays(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    # Nobody reads the board of this start, and the process dies before anybody could.
    async with device.running(crashing=True) as reconciler:
        await reconciler.submit(desired(NEW, generation=2))
        device.see(SOUND)
        await until(reconciler, lambda: phases(reconciler) == {SlotPhase.READY})
    for _ in range(MAX_CRASHES + 1):
        async with device.running(crashing=True) as reconciler:
            await reconciler.restored.wait()
            assert device.runs(NEW)
            assert phases(reconciler) == {SlotPhase.READY}
            assert reconciler.applied == Position(1, 2)


async def test_D17_a_fetch_that_is_called_off_ends_at_once_and_its_bytes_are_kept_for_later(tmp_path: Path) -> None:
    large = made_variant({"model.onnx": bytes(range(64))}, version=2, chunk_bytes=16)
    device = Device(tmp_path, OLD, large)
    await device.apply(desired(OLD, generation=1))
    device.shelf.faults.append(lambda replies: [*replies[:3], Silence()])
    async with device.running() as reconciler:
        aborted = reconciler.submit(desired(large, generation=2))
        await until(reconciler, lambda: stored_bytes(reconciler, large) >= 16)
        assert await reconciler.submit(desired(OLD, generation=3)) == PushResult(Position(1, 3))
        assert (await aborted).problem is not None
        assert device.runs(OLD)
        assert device.calls.calls[-1].is_cancelled


async def test_D17_a_self_test_that_is_called_off_ends_at_once(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    device.tester.gate = asyncio.Event()
    device.tester.entered.clear()
    async with device.running() as reconciler:
        reconciler.submit(desired(NEW, generation=2))
        await device.tester.entered.wait()
        assert await reconciler.submit(desired(OLD, generation=3)) == PushResult(Position(1, 3))
        assert device.journal().record.quarantine == ()


async def test_D18_an_update_during_an_update_ends_with_the_newest(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    async with device.running() as reconciler:
        device.host.gate = asyncio.Event()
        device.host.entered.clear()
        busy = reconciler.submit(desired(NEW, generation=2))
        await device.host.entered.wait()
        newest = reconciler.submit(desired(THIRD, generation=3))
        device.host.gate.set()
        assert (await busy).problem is not None
        assert await newest == PushResult(Position(1, 3))
        assert device.runs(THIRD)


async def test_D18_what_is_overtaken_on_probation_is_not_what_its_successor_falls_back_on(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    async with device.running() as reconciler:
        await reconciler.submit(desired(NEW, generation=2))
        await reconciler.submit(desired(THIRD, generation=3))
        device.see(FAULTY)
        await device.host.until(lambda: device.runs(OLD))
        assert device.host.loads == [OLD.digest, NEW.digest, THIRD.digest, OLD.digest]


async def test_D18_a_first_version_that_was_overtaken_on_probation_is_better_than_none(device: Device) -> None:
    async with device.running() as reconciler:
        await reconciler.submit(desired(OLD, generation=1))
        await reconciler.submit(desired(NEW, generation=2))
        device.see(FAULTY)
        await device.host.until(lambda: device.runs(OLD))


async def test_D18_a_rollback_does_not_wait_for_a_fetch_that_takes_long(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    async with device.running() as reconciler:
        await reconciler.submit(desired(NEW, generation=2))
        begun = asyncio.Event()

        def fall_silent(replies: list[pb.FetchChunksReply]) -> list[Sent]:
            begun.set()
            return [replies[0], Silence()]

        device.shelf.faults.append(fall_silent)
        slow = reconciler.submit(desired(NEW, OTHER, generation=3))
        await begun.wait()
        device.see(FAULTY)
        await device.host.until(lambda: OLD.digest in device.host.running().values())
        assert (await slow).problem is not None
        assert device.runs(OLD, OTHER)


async def test_D18_the_predecessor_stays_in_the_store_until_the_commit(device: Device) -> None:
    await device.apply(desired(OLD, generation=1))
    async with device.running() as reconciler:
        for generation in (2, 3, 4):
            await reconciler.submit(desired(NEW, generation=generation))
        device.shelf.drop(OLD)
        device.see(Vitals(runs=100, non_finite_runs=100))
        await device.host.until(lambda: device.runs(OLD))


async def test_nothing_of_a_variant_is_fetched_that_the_signed_terms_do_not_allow(device: Device) -> None:
    def refuse(manifest: Manifest, slot: Slot) -> None:
        raise Untrusted(f"{slot.model} {manifest.version}: withdrawn")

    await device.apply(desired(OLD, generation=1))
    device.shelf.asked.clear()
    device.allows = refuse
    async with device.running() as reconciler:
        await reconciler.restored.wait()
        assert device.runs(OLD), "what is in force goes on running"
        result = await reconciler.submit(desired(NEW, generation=2))
        assert result.problem is not None
        assert result.problem.message == "digits: digits 2: withdrawn"
        assert device.shelf.asked == []
