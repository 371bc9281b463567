"""A machine's /sys and /proc as files that a test writes: processor counters, batteries, processor time."""

from pathlib import Path


class Sysfs:
    def __init__(self, root: Path) -> None:
        self.root = root

    def zone(
        self, zone: str, micro_joules: int, *, name: str = "package-0", span: int | None = 262_143_328_850
    ) -> Path:
        """Write an energy counter such as `intel-rapl:0`."""
        folder = self.root / "sys" / "class" / "powercap" / zone
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text(f"{micro_joules}\n")
        if span is not None:
            (folder / "max_energy_range_uj").write_text(f"{span}\n")
        return folder

    def supply(self, name: str, *, kind: str = "Battery", **files: str | int) -> Path:
        """Write a power supply; files are named as in sysfs."""
        folder = self.root / "sys" / "class" / "power_supply" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in {"type": kind, **files}.items():
            (folder / file).write_text(f"{content}\n")
        return folder

    def processors(self, *, busy_ticks: int, idle_ticks: int) -> None:
        stat = self.root / "proc" / "stat"
        stat.parent.mkdir(parents=True, exist_ok=True)
        stat.write_text(f"cpu  {busy_ticks} 0 0 {idle_ticks} 7 0 0 0 500 0\ncpu0 1 1 1 1\n")
