"""The methods of a study, checked before its first run: settings that can be built, and a model that they fit."""

import copy

import torch

from moa_peft.data.base_loading import BaseSettings, empty_model, find_base, told_init_kwargs
from moa_peft.errors import UsageError
from moa_peft.quiet import quiet_libraries
from moa_peft.study.config import StudyConfig
from moa_peft.study.schedule import Run, recipe_of
from moa_peft.training.recipe import Recipe, build_peft_config
from moa_peft.training.trainer_settings import build_settings, check_trainer


def check_methods(config: StudyConfig) -> None:
    """Check that every method can be built, and its adapter put onto the base model, whose weights are not read.

    Raises:
        UsageError: If a method or a field of the trainer is wrong, there is no such model, or an adapter does not fit
            it.
    """
    recipes: dict[str, Recipe] = {}
    for one in config.methods:
        run = Run(label=one.label, method=one, learning_rate=float(config.learning_rates[0]), seed=0)
        try:
            recipe = recipe_of(config, run, data=config.data, data_md5=None, folder=config.out)
            check_trainer(recipe)
            build_peft_config(recipe)
            with quiet_libraries():
                build_settings(copy.deepcopy(recipe), has_validation=False, cuda=torch.cuda.is_available())
        except UsageError as error:
            raise UsageError(f"{one.label}: {error}") from error
        recipes[one.label] = recipe
    base = find_base(config.model, told_init_kwargs(config.trainer))
    for label, recipe in recipes.items():
        with quiet_libraries():
            _check_fit(label, recipe, base)


def _check_fit(label: str, recipe: Recipe, base: BaseSettings) -> None:
    from peft import get_peft_model

    model = empty_model(base)
    try:
        get_peft_model(model, build_peft_config(recipe))
    except ValueError as error:
        raise UsageError(f"{label} does not fit the model {recipe.model!r}: {error}") from error
