"""The faces of the data plane: MQTT for devices, gRPC for programs on the same machine."""
