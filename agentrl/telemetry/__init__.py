"""What a run leaves behind: its directory, its metrics, its logs."""
