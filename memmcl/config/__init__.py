"""The configuration of a run: one frozen tree, read from one YAML file, checked before anything starts.

`what` a run computes (everything but `name`, `promotion`, `store`, `ray` and the places of the rows) decides its id
and every cache key; where it computes does not.
"""

from memmcl.config.data import DataConfig, SourceConfig, SubtaskConfig
from memmcl.config.experts import ExpertsConfig
from memmcl.config.read import load_config, parse_config, read_yaml
from memmcl.config.run import (
    CurriculumConfig,
    EvaluationConfig,
    ModelConfig,
    PromotionConfig,
    RayConfig,
    RunConfig,
    StoreConfig,
)
from memmcl.config.search import SearchConfig

__all__ = [
    "CurriculumConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExpertsConfig",
    "ModelConfig",
    "PromotionConfig",
    "RayConfig",
    "RunConfig",
    "SearchConfig",
    "SourceConfig",
    "StoreConfig",
    "SubtaskConfig",
    "load_config",
    "parse_config",
    "read_yaml",
]
