import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from controller.heavy.arguments import ApplicationArguments, ClusterArguments
from controller.heavy.embedded import (
    make_private,
    prepare_session_dir,
    ray_environment,
    remove_session_dir,
    write_token,
)
from controller.heavy.local import cluster_arguments
from controller.settings import HeavySettings
from core.addresses import Address


def test_the_token_is_new_each_time_and_readable_by_this_user_alone(tmp_path: Path) -> None:
    first = write_token(tmp_path).read_text()
    token_file = write_token(tmp_path)
    assert token_file.stat().st_mode & 0o777 == 0o600
    assert token_file.read_text() != first
    assert len(first) == 64


def test_rays_settings_name_the_token_and_turn_reporting_off(tmp_path: Path) -> None:
    environment = ray_environment(tmp_path / "token")
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


def test_what_an_earlier_run_left_is_deleted(tmp_path: Path) -> None:
    old = prepare_session_dir(tmp_path / "state", temporary=tmp_path) / "session_1" / "logs"
    old.mkdir(parents=True)
    assert list(prepare_session_dir(tmp_path / "state", temporary=tmp_path).iterdir()) == []


def test_a_long_state_folder_gets_a_short_private_session_folder_of_its_own(tmp_path: Path) -> None:
    long = tmp_path / ("long" * 20)
    one, other = (prepare_session_dir(long / name, temporary=tmp_path) for name in ("one", "other"))
    assert one != other
    assert one.parent.parent == other.parent.parent == tmp_path
    assert one.parent.stat().st_mode & 0o777 == 0o700


def test_a_short_state_folder_holds_the_session_folder() -> None:
    with tempfile.TemporaryDirectory(prefix="nf", dir="/tmp") as name:
        assert prepare_session_dir(Path(name), temporary=Path("/nowhere")) == Path(name) / "ray"


def test_no_session_folder_is_left(tmp_path: Path) -> None:
    state_dir = tmp_path / ("long" * 20)
    remove_session_dir(prepare_session_dir(state_dir, temporary=tmp_path), state_dir)
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_place_of_the_private_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "ours").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="to be a folder of this user"):
        make_private(tmp_path / "ours")


def test_the_child_is_told_what_the_settings_say(tmp_path: Path) -> None:
    settings = HeavySettings(port=8123, min_replicas=1, max_replicas=3, cpus_per_replica=0.5, max_batch=16)
    tls_dir, controller = tmp_path / "tls", Address("127.0.0.1", 7443)
    told = cluster_arguments(settings, data_dir=tmp_path, controller=controller, tls_dir=tls_dir)
    assert told.bind == "127.0.0.1:8123"
    assert told.cpus == 2
    assert (told.application.controller, told.application.tls_dir) == ("127.0.0.1:7443", tls_dir)
    assert (told.application.max_replicas, told.application.max_batch) == (3, 16)
    assert ClusterArguments.model_validate_json(told.model_dump_json()) == told


def test_a_start_that_hangs_does_not_outlive_the_parent() -> None:
    hanging = """
import threading
from controller.heavy.embedded import watch_parent
threading.Thread(target=watch_parent, args=(threading.Event(),), kwargs={"force_after_s": 0.05}, daemon=True).start()
threading.Event().wait(60)
"""
    with subprocess.Popen([sys.executable, "-c", hanging], stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        # What the kernel does when the parent is killed.
        child.stdin.close()
        assert child.wait(timeout=30) == 1


@pytest.mark.parametrize(
    "keys", [{"controller": "nowhere"}, {"min_replicas": 2, "max_replicas": 1}, {"replicas": 1}, {"max_batch": 0}]
)
def test_arguments_that_do_not_fit_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        ApplicationArguments.model_validate(keys)


def test_arguments_come_from_the_command_line_of_serve_as_text() -> None:
    arguments = ApplicationArguments.model_validate({"controller": "127.0.0.1:7443", "max_replicas": "4"})
    assert arguments.max_replicas == 4
