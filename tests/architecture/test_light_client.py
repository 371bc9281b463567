"""The device client needs paho-mqtt and nothing else: in a process that can import nothing else it is complete."""

import json
import subprocess
import sys
from pathlib import Path

# Refuses what is neither of Python itself, nor paho, nor ours; then says which of our modules came in.
SCRIPT = """
import json, sys

class OnlyPaho:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | {"paho", "edge_agent", "core"}:
            raise ImportError(f"not on a device: {name}")

sys.meta_path.insert(0, OnlyPaho())
from edge_agent.client import DeviceClient
try:
    import numpy
except ImportError:
    pass
else:
    raise SystemExit("the blocker blocks nothing")
device = DeviceClient("camera", site="berlin", broker=("127.0.0.1", 1))
print(json.dumps(sorted(name for name in sys.modules if name.startswith(("core", "edge_agent")))))
"""


def test_the_client_imports_nothing_but_paho(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, check=True, capture_output=True, text=True)
    ours = set(json.loads(done.stdout))
    assert {name for name in ours if name.startswith("core")} == {"core", "core.backoff"}
    assert {name for name in ours if not name.startswith("core")} == {
        "edge_agent",
        *(name for name in ours if name.startswith("edge_agent.client")),
    }
