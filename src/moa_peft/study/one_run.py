"""One run of a study: trained, or taken up where it was cut off, then scored. Nothing here knows of other runs."""

import dataclasses
import gc
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moa_peft.data.base_loading import told_init_kwargs
from moa_peft.data.row import Row
from moa_peft.data.templates import Template
from moa_peft.errors import UsageError
from moa_peft.evaluation.loading import default_dtype, load, read_adapter
from moa_peft.evaluation.result_key import ModelIdentity, identify, identify_loaded
from moa_peft.evaluation.run import evaluate
from moa_peft.evaluation.tasks import Task
from moa_peft.peak_memory import PeakMemory
from moa_peft.provenance import RECIPE_FILE, provenance
from moa_peft.quiet import quiet_libraries
from moa_peft.study.config import FROZEN, Method, StudyConfig
from moa_peft.study.data import RowSet, StudyData, questions_md5, scoring_options, source_of
from moa_peft.study.folder import TRAINING_FILE
from moa_peft.study.rows import RunRow, Scores, StepTime
from moa_peft.study.schedule import Job, recipe_of
from moa_peft.training.checkpoints import find_checkpoints, unmark
from moa_peft.training.output_folder import write_text
from moa_peft.training.prepare import prepare
from moa_peft.training.recipe import Recipe, build_peft_config
from moa_peft.training.run import run as train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TRAINED = ("rows_dropped", "trainable_parameters", "total_parameters", "steps", "final_loss", "train_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """All that a process needs to do one run."""

    config: StudyConfig
    data: StudyData
    job: Job
    config_hash: str
    """Hash of all that decides the run."""
    command: str
    """The command line that the study was started with."""
    base_fingerprint: str | None = None
    """Hash of the base model's weights in the rows that there are; None before the first."""
    progress: bool = True
    """Show bars on standard error."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.out) / "runs" / self.job.run.name

    @property
    def rows(self) -> RowSet:
        """The rows that the run is trained on."""
        return self.data.train if self.job.run.rows is None else self.data.short

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """How the base model is loaded for scoring: as for training, in `default_dtype` where the study gives none."""
        method = self.job.run.method
        told = told_init_kwargs(self.config.trainer if method is None else self.config.trainer_of(method))
        return told | ({"dtype": default_dtype()} if told.get("dtype") == "auto" else {})


class OtherBaseError(UsageError):
    """The base model has not the weights that the rows of a study are of."""


def reads_bf16(config: StudyConfig, method: Method | None) -> bool:
    """Whether the runs of a method, or the base model's own, read the base model in bfloat16."""
    return bool(config.trainer.get("bf16") if method is None else config.trainer_of(method)["bf16"])


def execute(order: Order) -> RunRow:
    """Do a run as far as its stage asks; what an earlier process had finished is not done again.

    Returns:
        Its row. An error ends in a row with the failure, so that a study goes on.

    Raises:
        OSError: If the disk is full or closed; the next run would meet it too.
        OtherBaseError: If the base model is not that of the rows so far; likewise.
    """
    found: dict[str, Any] = {}
    failure = None
    try:
        with quiet_libraries():
            if order.job.run.method is not None:
                found |= train_once(order)
                _free()
            found |= score(order)
    except (OSError, OtherBaseError):
        raise
    except Exception as error:  # noqa: BLE001  # whatever it is, it is this run's failure and stands in its row
        failure = " ".join(f"{type(error).__name__}: {error}".split())
    finally:
        _free()
    return describe(order, found, failure)


def check_base(order: Order, identity: ModelIdentity) -> None:
    """Check that the base model is that of the rows there are.

    Raises:
        OtherBaseError: If it is not.
    """
    found = identity.base_fingerprint
    if order.base_fingerprint not in (None, found):
        raise OtherBaseError(
            f"the weights of the base model {order.config.model} are {found}, in the rows of the study in "
            f"{order.config.out} {order.base_fingerprint}: give the model that they are of, in the dtype that it had, or "
            "another --out"
        )


def train_once(order: Order) -> dict[str, Any]:
    """Train a run with a method, or go on with it, or read what it gave.

    Returns:
        Fields of `RunRow` about the training. The adapter then lies in the run's folder, without checkpoints.
    """
    folder = order.folder
    done = folder / TRAINING_FILE
    if done.exists() and not list(folder.glob("adapter_model.*")):
        shutil.rmtree(folder)  # its weights are gone
    if not done.exists():
        if order.base_fingerprint is not None:  # as scoring reads it: training's dtype may be another
            check_base(order, identify(load(order.config.model, init_kwargs=order.init_kwargs).model))
            _free()
        recipe = run_recipe(order)
        begun = (folder / RECIPE_FILE).exists()
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)  # cut off before its first step
        preparation = prepare(dataclasses.replace(recipe, resume=begun))
        memory = PeakMemory(cuda=torch.cuda.is_available())
        outcome = train(preparation)
        trained = {name: getattr(outcome, name) for name in _TRAINED}
        step_ms = step_time(preparation.clock.seconds)
        cost = {"peak_mem_mib": memory.mib(), "step_ms": step_ms and dataclasses.asdict(step_ms)}
        write_text(done, json.dumps({**trained, **cost}) + "\n")
    for checkpoint in (*find_checkpoints(folder).complete, *find_checkpoints(folder).incomplete):
        unmark(checkpoint)
        shutil.rmtree(checkpoint)
    found = json.loads(done.read_text(encoding="utf-8"))
    return {**found, "step_ms": StepTime(**found["step_ms"]) if found.get("step_ms") else None}


def step_time(seconds: Sequence[float]) -> StepTime | None:
    """Quartiles of the steps of one process but its first, which warms up; None for fewer than two."""
    times = [1000 * one for one in seconds[1:]]
    if len(times) < 2:
        return None
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return StepTime(lower=lower, median=median, upper=upper, steps=len(times))


def run_recipe(order: Order) -> Recipe:
    """The recipe of a run."""
    config = order.config
    recipe = recipe_of(
        config,
        order.job.run,
        data=source_of(config, config.data),
        data_md5=order.rows.md5,
        folder=str(order.folder),
    )
    if order.progress:
        return recipe
    return dataclasses.replace(recipe, trainer={**recipe.trainer, "disable_tqdm": True})


def score(order: Order) -> dict[str, Any]:
    """Score a run on the validation rows and on the tests that are missing, as fields of `RunRow`.

    The model is read from the disk, so that a run cut off after its training scores as one that was not.
    """
    start, config, run = time.perf_counter(), order.config, order.job.run
    adapter = None if run.method is None else read_adapter(str(order.folder))
    loaded = load(config.model, adapter, init_kwargs=order.init_kwargs)
    identity = identify_loaded(loaded)
    check_base(order, identity)
    options, texts = (
        dataclasses.replace(one, out=order.folder / "evaluation", progress=order.progress)
        for one in scoring_options(config)
    )
    tests = [(one, options) for one in order.data.tests if one.name in order.job.tests]
    tests += [(one, texts) for one in order.data.forgetting if one.name in order.job.tests]
    scores = {
        task.name: as_scores(task, evaluate(loaded.model, loaded.tokenizer, task, how, identity=identity))
        for task, how in ((order.data.validation, options), *tests)
    }
    validation = scores.pop(order.data.validation.name)
    router = None
    if order.job.stage == "final" and config.router_prompts and adapter is not None:
        prompts = [one.row for one in order.data.validation.questions[: config.router_prompts]]
        router = router_summary(loaded.model, loaded.tokenizer, prompts, config.template)
    return {
        "base_settings": loaded.base_settings,
        "base_fingerprint": identity.base_fingerprint,
        "adapter_fingerprint": identity.adapter_fingerprint,
        "validation": validation,
        "tests": scores,
        "router": router,
        "evaluate_s": round(time.perf_counter() - start, 3),
    }


def as_scores(task: Task, result: Any) -> Scores:
    """Take what a study keeps out of an evaluation's result."""
    row = result.row
    return Scores(
        n=row.n,
        md5=questions_md5(task),
        file_md5=task.file_md5,
        mode=row.mode,
        extraction=row.extraction,
        accuracy=row.accuracy,
        standard_error=row.standard_error,
        answer_loss=row.answer_loss,
        answer_loss_standard_error=row.answer_loss_standard_error,
        correct="".join("1" if one else "0" for one in result.correct()),
        losses=[float(f"{one:.6g}") for one in result.losses()],
    )


def describe(order: Order, found: Mapping[str, Any], failure: str | None) -> RunRow:
    """Write the row of a run from what was found; what was not come to is None."""
    config, run = order.config, order.job.run
    trained = run.method is not None
    names = {one.name for one in dataclasses.fields(RunRow)}
    empty = dict.fromkeys((*_TRAINED, "step_ms", "peak_mem_mib", "base_fingerprint", "adapter_fingerprint"))
    empty |= {"validation": None, "router": None, "evaluate_s": None, "tests": {}}
    values: dict[str, Any] = {
        "stage": order.job.stage,
        "label": run.label,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "config_hash": order.config_hash,
        "failure": failure,
        "method": FROZEN if run.method is None else run.method.method,
        "mixture": {} if run.method is None else run.method.mixture,
        "method_config": config_parts(run_recipe(order)) if trained else {},
        "trainer": {} if run.method is None else config.trainer_of(run.method),
        "model": config.model,
        "template": config.template,
        "max_length": config.max_length,
        "draw_seed": config.draw_seed,
        "train": order.rows,
        **provenance(),
        "command": order.command,
    }
    return RunRow(**{name: value for name, value in {**empty, **values, **found}.items() if name in names})


def config_parts(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe's method, with every field, as JSON holds them."""
    whole = build_peft_config(recipe).to_dict()
    return json.loads(
        json.dumps({name: whole.get(name) for name in ("experts", "router", "layers_to_transform")})
    )


def _free() -> None:
    """Give back what a model held before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def router_summary(
    model: Any, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], template: Template
) -> dict[str, float | None] | None:
    """Sum up what a model's routers do on the prompts of rows, by the names in `rows.ROUTER_FIGURES`; None without a router."""
    from moa_peft.inspection.prompts import as_prompt
    from moa_peft.inspection.results import routing_summary

    found = routing_summary(model, tokenizer, [as_prompt(row, template, tokenizer) for row in rows])
    return None if found["active_experts"] is None else found
