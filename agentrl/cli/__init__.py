"""The command line and the live terminal view."""
