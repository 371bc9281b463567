"""How the agent is: `status_file` writes and reads it, `report` shows it, `state_folder` says if it is alive."""
