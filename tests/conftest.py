"""What holds for every test."""

import os

# Before gRPC is imported: its fork handlers crash about one child in a hundred that starts during a call.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
