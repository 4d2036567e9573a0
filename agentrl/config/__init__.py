"""Every setting of a run: ``load_config`` composes and validates, ``Config`` holds the result."""

from agentrl.config.load import dump_config, find_config, load_config, parse_config
from agentrl.config.schema import Config

__all__ = ["Config", "dump_config", "find_config", "load_config", "parse_config"]
