"""The zoo: one file per system. Names are looked up in `arcore._registry`, which imports a file on first use."""

from arcore._registry import System, count_parameters, create_model, get_config, list_models, model_info, systems

__all__ = ["System", "count_parameters", "create_model", "get_config", "list_models", "model_info", "systems"]
