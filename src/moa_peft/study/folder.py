"""The folder of a study: nothing in it that another config has made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa_peft.errors import UsageError
from moa_peft.json_lines import RESULTS_FILE
from moa_peft.provenance import RECIPE_FILE
from moa_peft.study.config import StudyConfig
from moa_peft.study.data import StudyData, source_of
from moa_peft.study.formatting import run_name
from moa_peft.study.rows import RunRow
from moa_peft.study.schedule import Run, method_settings, recipe_of
from moa_peft.training.checkpoints import changed_keys
from moa_peft.training.output_folder import read_recipe, write_text

STUDY_FILE = "study.json"
"""What the runs of a study have in common, and its methods, in its folder."""

TRAINING_FILE = "training.json"
"""Written last of a training run, in its folder: what it gave."""


def check_same_study(
    folder: Path,
    config: StudyConfig,
    shared: Mapping[str, Any],
    rows: Sequence[RunRow],
    *,
    tests: Sequence[str],
    forgetting: Sequence[str],
    md5: Mapping[str, str] | None = None,
) -> None:
    """Check that what a folder holds was made with the same settings; methods, seeds, rates and tasks may be added.

    Args:
        folder: The study's folder.
        config: The study as it is given now.
        shared: From `shared_settings`.
        rows: What is done.
        tests: Names of its tests.
        forgetting: Names of the tasks that tell what training took away, which are scored in a way of their own.
        md5: MD5 of the rows of each of both; None where they are not at hand.

    Raises:
        UsageError: If a setting differs, or rows do not compare with each other; the message names each with both values.
    """
    before = read_study(folder)
    if before is None:
        if rows:
            raise UsageError(
                f"{folder} holds {RESULTS_FILE} without {STUDY_FILE}: put the {STUDY_FILE} of these rows beside it, or "
                "give another --out"
            )
        return
    differing = _differing(before["settings"], shared, "")
    for one in config.methods:
        if one.label in before["methods"]:
            differing += _differing(before["methods"][one.label], method_settings(one), f"{one.label}: ")
    known = {name: scores.md5 for row in rows for name, scores in row.tests.items()} | before["tests"]
    _check_joined(folder, rows, known)
    differing += [
        f"the rows of {name}: MD5 was {known[name]}, is {new}"
        for name, new in (md5 or {}).items()
        if known.get(name, new) != new
    ]
    by_text = {name: name in forgetting or config.mode == "text" for name in (*tests, *forgetting)}
    moved = {
        name
        for row in rows
        for name, scores in row.tests.items()
        if name in by_text and by_text[name] != (scores.mode == "text")
    }
    differing += [
        f"{name} moved between tasks and forgetting, which score it in two ways" for name in sorted(moved)
    ]
    if differing:
        raise UsageError(
            f"the study in {folder} was started with other settings ({'; '.join(differing)}): go on with those, or "
            "give another --out; methods, seeds, learning rates and tasks may be added"
        )


def _check_joined(folder: Path, rows: Sequence[RunRow], md5: Mapping[str, str]) -> None:
    """Check that rows compare: of the same questions of each test, and of one base model where it was loaded alike."""
    bases: dict[str, str] = {}
    wrong: list[str] = []
    for row in rows:
        wrong += [
            f"{run_name(row)}: the rows of {name} have MD5 {scores.md5}, not {md5[name]}"
            for name, scores in row.tests.items()
            if scores.md5 != md5[name]
        ]
        if row.base_settings is not None and row.base_fingerprint is not None:
            first = bases.setdefault(json.dumps(row.base_settings, sort_keys=True), row.base_fingerprint)
            if row.base_fingerprint != first:
                wrong.append(
                    f"{run_name(row)}: the weights of the base model are {row.base_fingerprint}, not {first}"
                )
    if wrong:
        raise UsageError(
            f"{folder / RESULTS_FILE} holds rows that do not compare ({'; '.join(wrong)}): take out those of one kind, "
            "or give another --out"
        )


def check_run_folders(config: StudyConfig, runs: Sequence[Run], data: StudyData) -> None:
    """Check that the folders of the runs hold what this config trains: rows and settings may be gone, weights not.

    Raises:
        UsageError: If a run there was trained, or begun, with other settings.
    """
    source = source_of(config, config.data)
    for run in runs:
        folder = Path(config.out) / "runs" / run.name
        if not any((folder / name).exists() for name in (RECIPE_FILE, TRAINING_FILE)):
            continue
        rows = data.train if run.rows is None else data.short
        recipe = recipe_of(config, run, data=source, data_md5=rows.md5, folder=str(folder))
        again = "delete that folder to train it again, or give another --out"
        if not (folder / RECIPE_FILE).exists():
            raise UsageError(f"{folder} holds {TRAINING_FILE} without {RECIPE_FILE}: {again}")
        begun = read_recipe(folder)
        if (folder / TRAINING_FILE).exists() and Path(begun["model"]).name == Path(recipe.model).name:
            begun["model"] = recipe.model  # where it lies matters to a run that goes on alone
        changed = changed_keys(begun, recipe.to_mapping())
        if changed:
            raise UsageError(
                f"the run in {folder} was begun with other values of {', '.join(changed)}: go on with those, {again}"
            )


def write_study(
    folder: Path, config: StudyConfig, shared: Mapping[str, Any], tests: Mapping[str, str]
) -> None:
    """Write down what the runs have in common; methods and tests that an earlier call had are kept."""
    before = read_study(folder) or {"methods": {}, "tests": {}}
    methods = before["methods"] | {one.label: method_settings(one) for one in config.methods}
    study = {"settings": dict(shared), "methods": methods, "tests": {**before["tests"], **tests}}
    if study != before:
        write_text(folder / STUDY_FILE, json.dumps(study, indent=1) + "\n")


def read_study(folder: Path) -> dict[str, Any] | None:
    """Read what `write_study` wrote; None where there is nothing.

    Raises:
        UsageError: If the file is damaged.
    """
    file = folder / STUDY_FILE
    if not file.exists():
        return None
    try:
        study = json.loads(file.read_text(encoding="utf-8"))
        return {name: dict(study[name]) for name in ("settings", "methods", "tests")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{file} is damaged: get the file of this study again, or give another --out"
        ) from error


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> list[str]:
    return [
        f"{where}{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
