"""The gateway: the controller's data plane, used by every face. It dispatches requests to the heavy tier."""
