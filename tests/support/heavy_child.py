"""A child in place of `controller.heavy.embedded`: `python -m tests.support.heavy_child HOW ARGUMENTS`.

Writes a line to `starts` in the folder that the arguments name; then ends at once (`brief`), sleeps until it is asked
to end (`obedient`), or sleeps and ignores that (`stubborn`).
"""

import signal
import sys
import time

from controller.heavy.arguments import ClusterArguments

how, arguments = sys.argv[1], ClusterArguments.model_validate_json(sys.argv[2])
if how == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with (arguments.state_dir / "starts").open("a") as starts:
    starts.write(f"{how}\n")
if how == "brief":
    sys.exit(3)
time.sleep(60)
