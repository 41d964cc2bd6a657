"""The command `softprompt`: the top of the house.

It is thin, and starts fast: what a command needs is imported when it runs. A user's mistake ends with one sentence
and exit code 2, anything else that goes wrong with one sentence, exit code 1 and the traceback in a log file.
"""

import errno
import json
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from softprompt.errors import UserError
from softprompt.home import (
    cache_home,
    owns_tracking,
    require_tracking,
    require_writable,
    state_home,
    tracking_uri,
    without_secrets,
)

if TYPE_CHECKING:
    from softprompt.evaluation import Metrics
    from softprompt.registry import Decision
    from softprompt.spec import ExperimentSpec
    from tasks.evaluate import Evaluation

_GOES_ON = "stopped; everything so far is saved, and the same command goes on with it"

app = typer.Typer(
    name="softprompt",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Find, prove and keep the best soft prompt for a frozen language model.",
)

Experiment = Annotated[Path, typer.Argument(help="An experiment's YAML file, as experiments/movie-sentiment.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field by its dotted key, as budget.trials=4."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Validate data and model, print plan and cost, and end.")]


@app.command()
def sweep(
    experiment: Experiment,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    lanes: Annotated[
        str | None, typer.Option(metavar="N", help="Processes that train trials; auto is one for each GPU.")
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="Give up an interrupted sweep, and begin anew.")] = False,
) -> None:
    """Search for the best prompt, measure it on the test split, and register it.

    A sweep of the same experiment that was interrupted is gone on with.
    """
    with _one_sentence(_GOES_ON):
        # The number of lanes is a field like any other.
        spec = _read(experiment, [*(overrides or []), *([f"execution.lanes={lanes}"] if lanes else [])])
        if dry_run:
            _print_plan(spec)
            return
        _begin(f"sweep of {spec.name}")
        from flows.sweep import sweep as run
        from flows.terminal import shown

        with shown():
            result = run(spec, new)
        _print_systems(result.evaluation.systems)
        _print_decision(result.decision)


@app.command()
def retune(experiment: Experiment, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """On fresh data, tell drift and search from the champion on; without new rows nothing is done."""
    with _one_sentence():
        spec = _read(experiment, overrides)
        if dry_run:
            _print_retune_plan(spec)
            return
        _begin(f"retune of {spec.name}")
        from flows.retune import retune as run
        from flows.terminal import shown

        with shown():
            result = run(spec)
        if result.swept is None:
            return  # it has been said that there is nothing new
        _print_systems(result.swept.evaluation.systems)
        _print_decision(result.swept.decision)


@app.command()
def lane(
    experiment: Experiment,
    overrides: Overrides = None,
    sweep: Annotated[str | None, typer.Option(help="Name of the sweep; needed where several are open.")] = None,
) -> None:
    """Train trials of a sweep that is running, as one more lane of it, until there is nothing left to train."""
    with _one_sentence():
        spec = _read(experiment, overrides)
        _begin(f"lane of {spec.name}")
        from flows.lane import tune_lane
        from flows.terminal import shown

        with shown():
            trials = tune_lane(spec, sweep)
        typer.echo(f"nothing is left to train; the sweep has {len(trials)} trials")


@app.command()
def tune(
    experiment: Experiment,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="New folder to save the prompt in.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Train one prompt and measure it; nothing is searched or registered.

    It is the first of search.start; where that is empty, what the search would try first.
    """
    with _one_sentence(_GOES_ON):
        spec = _read(experiment, overrides)
        _require_new(out)
        if dry_run:
            _print_plan(spec.with_one_trial())
            return
        _begin(f"one prompt for {spec.name}")
        from flows.terminal import shown
        from flows.tune import tune as run

        with shown():
            evaluation = run(spec)
        _print_systems(evaluation.systems)
        _keep(evaluation, spec, out)


@app.command()
def evaluate(
    experiment: Experiment,
    overrides: Overrides = None,
    version: Annotated[str, typer.Option(help="Alias or number of the registered version.")] = "champion",
    dry_run: DryRun = False,
) -> None:
    """Measure a registered prompt on the test split, beside the baselines."""
    with _one_sentence():
        spec = _read(experiment, overrides)
        if dry_run:
            _print_plan(spec, training=False)
            return
        _begin(f"evaluation of {spec.name} {version}")
        from flows.evaluate import evaluate as run
        from flows.terminal import shown

        with shown():
            systems = run(spec, version)
        _print_systems(systems)


@app.command()
def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to answer.")] = None,
    file: Annotated[Path | None, typer.Option(help="CSV, TSV, JSONL or Parquet file of rows to answer.")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file to write; standard output by default.")] = None,
    model: Annotated[str | None, typer.Option(help="Registered model; needed where there are several.")] = None,
    version: Annotated[str, typer.Option(help="Alias or number of the version.")] = "champion",
    prompt: Annotated[Path | None, typer.Option(help="Folder of a saved prompt, instead of a registered one.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Answer texts, or the rows of a file, with a prompt of the registry: a label for each, or a text."""
    with _one_sentence():
        if bool(texts) == (file is not None):
            raise UserError('give either texts, as in: softprompt predict "a fine film", or --file ROWS.csv')
        _begin(state=False)
        from flows.predict import choose_prompt, predict_file, predict_texts, require_place

        require_place(out)
        chosen = choose_prompt(prompt, model, version)
        if file is None:
            predict_texts(chosen, texts or [], out, device)
        else:
            predict_file(chosen, file, out, device)


@app.command()
def device(
    experiment: Annotated[Path | None, typer.Argument(help="An experiment's YAML file, to try its model.")] = None,
    overrides: Overrides = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N; the experiment's by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what this machine's device is and does, alone or with an experiment's model; nothing is recorded."""
    with _one_sentence():
        if experiment is None and overrides:
            raise UserError("--set: changes an experiment, and none is given; name its file")
        # The device is a field like any other.
        changes = [*(overrides or []), *([f"execution.device={device}"] if device else [])]
        spec = _read(experiment, changes) if experiment else None
        _begin(state=False)
        from softprompt.backbone import pick_device
        from softprompt.findings import find_device, find_model
        from softprompt.workbench import Workbench

        found = find_device(pick_device(spec.execution.device if spec else device or "auto"))
        if spec is not None:
            found = find_model(Workbench(spec), found)
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=1))
            return
        for subject, text in found.lines().items():
            typer.echo(f"{subject:<12} {text}")


@app.command()
def ui(
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where MLflow and Prefect listen; beyond loopback with a password.")
    ] = "127.0.0.1",
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the MLflow pages.")] = 5000,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the Prefect pages.")] = 4200,
    optuna_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the Optuna dashboard.")] = 8080,
) -> None:
    """Serve the MLflow, Prefect and Optuna pages over the local state, on loopback unless --host says otherwise.

    Where SOFTPROMPT_UI_AUTH=user:password is set in the environment, MLflow and Prefect ask for both.
    """
    with _one_sentence():
        _begin()
        from flows.ui import serve_pages

        serve_pages(host=host, mlflow_port=mlflow_port, prefect_port=prefect_port, optuna_port=optuna_port)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def up(
    context: typer.Context,
    workers: Annotated[int, typer.Option(min=0, max=256, help="Workers for lanes, beside one for sweeps.")] = 1,
    postgres_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of PostgreSQL.")] = 5433,
) -> None:
    """Serve what many lanes need: PostgreSQL, the pages over it (with the options of `ui`), and workers.

    Where SOFTPROMPT_POSTGRES=postgresql://user:password@host:5432 is set in the environment, that server is used.
    """
    with _one_sentence():
        require_writable(state_home(), "SOFTPROMPT_HOME")
        from flows.site import serve_site

        serve_site(workers=workers, postgres_port=postgres_port, options=context.args)


def main() -> None:
    """Entry point of the command."""
    app()


def _read(file: Path, overrides: list[str] | None) -> "ExperimentSpec":
    from softprompt.spec import load_experiment

    return load_experiment(file, overrides)


def _begin(title: str = "", *, state: bool = True) -> None:
    """What every command needs before it imports Prefect or MLflow, which takes a while: so it says what begins.

    Args:
        title: What begins, for a person; given for a flow, which keeps records.
        state: Whether the command may write state, as a flow does.
    """
    from flows.environment import prepare_environment

    if title:
        require_tracking()
        typer.echo(f"{title}; state in {os.path.relpath(state_home())}")

    if state:
        require_writable(state_home(), "SOFTPROMPT_HOME")
    require_writable(cache_home(), "SOFTPROMPT_CACHE")
    prepare_environment(state=state)


def _print_plan(spec: "ExperimentSpec", *, training: bool = True) -> None:
    _begin(state=False)
    from softprompt.plan import plan, plan_evaluation
    from softprompt.workbench import Workbench

    bench = Workbench(spec)
    for subject, text in (plan(bench) if training else plan_evaluation(bench)).items():
        typer.echo(f"{subject:<12} {text}")


def _print_retune_plan(spec: "ExperimentSpec") -> None:
    _begin(state=False)
    from softprompt.plan import plan
    from softprompt.retuning import EARLIER, find_news, tell_drift, warm_start
    from softprompt.workbench import Workbench

    bench = Workbench(spec)
    news = find_news(spec, bench.data)
    told = {"retune": news.nothing_new or "a sweep, as there is no champion yet"}
    if news.champion is not None and not news.nothing_new:
        start = warm_start(bench, news.champion, earlier=EARLIER)
        told = {"retune": start.told, "drift": tell_drift(bench, news.champion).verdict}
        bench = Workbench(start.experiment, bench.data, bench.backbone)
    for subject, text in (told if news.nothing_new else told | plan(bench)).items():
        typer.echo(f"{subject:<12} {text}")


def _print_decision(decision: "Decision") -> None:
    program = sys.argv[0]
    folder = shlex.quote(os.path.dirname(program))
    # A store of the user's own is in their environment already, maybe with a password.
    store = f"MLFLOW_TRACKING_URI={shlex.quote(tracking_uri())} " if owns_tracking() else ""
    typer.echo(f"\n{decision.name} v{decision.version} {decision.verdict}: {decision.reason}")
    typer.echo(f'\nUse it:    {program} predict --model {decision.name} "..."')
    typer.echo(f"See it:    {program} ui")
    typer.echo(
        f"Serve it:  PATH={folder}:$PATH {store}mlflow models serve "
        f"-m models:/{decision.name}@champion --env-manager local -p 5099"
    )


def _require_new(out: Path | None) -> None:
    """Before hours of training: whether the folder can be made, and is nobody's."""
    if out is None:
        return
    if out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    if not (out.absolute().parent.is_dir() and os.access(out.absolute().parent, os.W_OK)):
        raise UserError(f"--out {out}: {out.absolute().parent} is no folder that can be written; make it first")


def _keep(evaluation: "Evaluation", spec: "ExperimentSpec", out: Path | None) -> None:
    """Save a tuned prompt in the folder asked for, and tell where it is."""
    from softprompt.prompt import SoftPrompt
    from softprompt.tracking import Tracker

    typer.echo(f"\n{evaluation.title}; its prompt is an artifact of the MLflow run {evaluation.run_id}")
    if out is None:
        typer.echo("With --out FOLDER it is saved in a folder as well.")
        return
    with tempfile.TemporaryDirectory() as folder:
        SoftPrompt.load(Tracker(spec).fetch_prompt(evaluation.run_id, Path(folder))).save(out)
    typer.echo(f'Use it:  {sys.argv[0]} predict --prompt {shlex.quote(str(out))} "..."')


def _print_systems(systems: "dict[str, Metrics]") -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(systems.values()))
    title = f"{first.objective.name} on {first.rows:,} test rows that the search has not seen"
    table = Table("system", title=title, title_justify="left")
    for name in first.cells:
        table.add_column(name, justify="right")
    for name, m in systems.items():
        table.add_row(name, *m.cells.values())
    # The names hold texts of the user's, whose [brackets] and :colons: are no markup.
    Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, emoji=False).print(table)


@contextmanager
def _one_sentence(stopped: str = "stopped; nothing is left half-done") -> Iterator[None]:
    try:
        yield
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail(stopped, 130)
    except (typer.Exit, SystemExit):
        raise
    except Exception as error:
        _fail(_explain(error), 1)
    except BaseException as error:
        if type(error).__name__ != "TerminationSignal":  # Prefect's, for SIGTERM; it is imported only where a flow runs
            raise
        _fail(stopped, 143)


def _explain(error: Exception) -> str:
    """One sentence for what is no fault of the user's; the traceback goes into a file, where one can be written."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            moves = "SOFTPROMPT_HOME moves the state, SOFTPROMPT_CACHE the caches"
            return f"the disk is full or read-only ({_first_line(cause)}); free it up, or write elsewhere: {moves}"
        if "database or disk is full" in str(cause) or "readonly database" in str(cause):
            return f"the disk is full or read-only ({_first_line(cause)}); free {state_home()} or set SOFTPROMPT_HOME"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {_first_line(error)}{_keep_traceback(error)}"


def _keep_traceback(error: Exception) -> str:
    file = state_home() / "logs" / f"error-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(without_secrets("".join(traceback.format_exception(error))), encoding="utf-8")
    except OSError:
        return ""
    return f" (details in {file})"


def _first_line(error: BaseException) -> str:
    return without_secrets(str(error)).strip().partition("\n")[0][:300]


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"softprompt: {without_secrets(message)}", err=True)
    raise typer.Exit(code)
