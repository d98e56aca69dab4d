"""The configuration of a run. Imports neither torch nor Transformers."""

from finetune.config.config import Config, ConfigError

__all__ = ["Config", "ConfigError"]
