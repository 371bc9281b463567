"""How much memory may still be taken: what the kernel and the control groups say."""

from pathlib import Path

import pytest

from edge_agent.runtime.memory import available_bytes

MIB = 1 << 20


def machine(root: Path, *, available_mib: int = 1000, cgroup: str = "", **files: str) -> Path:
    """Lay out a /proc and a /sys; `files` of a cgroup by their path with "__" for "/" and "_of_" for "."."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {available_mib * 1024} kB\n")
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, content in files.items():
        path = root / "sys" / "fs" / "cgroup" / name.replace("__", "/").replace("_of_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_without_a_control_group_it_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert available_bytes(root=machine(tmp_path)) == 1000 * MIB


def test_a_limit_of_version_2_leaves_what_is_not_in_use(tmp_path: Path) -> None:
    root = machine(
        tmp_path, cgroup="0::/unit\n", unit__memory_of_max=str(500 * MIB), unit__memory_of_current=str(200 * MIB)
    )
    assert available_bytes(root=root) == 300 * MIB


def test_file_pages_that_nobody_used_for_a_while_do_not_count_as_taken(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        cgroup="0::/unit\n",
        unit__memory_of_max=str(500 * MIB),
        unit__memory_of_current=str(200 * MIB),
        unit__memory_of_stat=f"anon 5\ninactive_file {50 * MIB}\n",
    )
    assert available_bytes(root=root) == 350 * MIB


def test_the_tightest_limit_above_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        cgroup="0::/slice/unit\n",
        slice__memory_of_max=str(100 * MIB),
        slice__memory_of_current=str(40 * MIB),
        slice__unit__memory_of_max="max",
        slice__unit__memory_of_current=str(30 * MIB),
    )
    assert available_bytes(root=root) == 60 * MIB


def test_in_a_container_the_mount_itself_is_the_group(tmp_path: Path) -> None:
    root = machine(
        tmp_path, cgroup="0::/../seen/from/outside\n", memory_of_max=str(70 * MIB), memory_of_current=str(20 * MIB)
    )
    assert available_bytes(root=root) == 50 * MIB


def test_a_limit_of_version_1_counts_too(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        cgroup="4:cpu:/\n3:hugetlb,memory:/unit\n",
        memory__unit__memory_of_limit_in_bytes=str(90 * MIB),
        memory__unit__memory_of_usage_in_bytes=str(60 * MIB),
        memory__unit__memory_of_stat=f"total_inactive_file {10 * MIB}\n",
        memory__memory_of_limit_in_bytes="9223372036854771712",
        memory__memory_of_usage_in_bytes=str(60 * MIB),
    )
    assert available_bytes(root=root) == 40 * MIB


def test_a_group_that_uses_more_than_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/\n", memory_of_max=str(MIB), memory_of_current=str(2 * MIB))
    assert available_bytes(root=root) == 0


@pytest.mark.parametrize("damage", ["cgroup", "meminfo"])
def test_a_system_that_tells_nothing_is_no_error(tmp_path: Path, damage: str) -> None:
    root = machine(tmp_path, cgroup="no colon in here\n")
    (root / "proc" / ("self/cgroup" if damage == "cgroup" else "meminfo")).unlink()
    assert available_bytes(root=root) == (1000 * MIB if damage == "cgroup" else None)
