"""``python -m agentrl`` is the same program as ``agentrl``."""

from agentrl.cli.main import main

if __name__ == "__main__":
    main()
