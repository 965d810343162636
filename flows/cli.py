"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memmcl import __version__
from memmcl.config import RunConfig, load_config
from memmcl.errors import MemmclError, UsageError

if TYPE_CHECKING:
    from prefect.states import State

    from memmcl.store import ArtifactRef, Champions, Manifest, Reign, Store

INTERRUPTED = 130
CHAMPION = "champion"

app = typer.Typer(
    help="One sentiment model out of many LoRA experts: train, merge by evolution, evaluate, report.\n\n"
    "For example:\n\n"
    "$ memmcl run deployments/configs/quickstart.yaml\n"
    '$ memmcl predict "The food was great, the wait was not."',
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
)  # fmt: skip
store_app = typer.Typer(
    help="Look into the artifact store: every expert, search, evaluation and report of every run.", no_args_is_help=True
)
app.add_typer(store_app, name="store")
champion_app = typer.Typer(
    help="The champion: the run whose model is in use. Retrains challenge it; a person may roll it back.",
    no_args_is_help=True,
)
app.add_typer(champion_app, name="champion")
console = Console(highlight=False, markup=False, emoji=False)  # paths, names and answers may hold [brackets]

StoreUrl = Annotated[
    str | None,
    typer.Option("--store", help="Directory or s3://bucket/folder; without it, that of --config, else memmcl-store"),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of a run; its store section is used")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in experts.steps=80; may be repeated"),
]
RunId = Annotated[
    str | None,
    typer.Option("--run", help="First digits of a run's id, or champion; the latest run by default"),
]
ChampionName = Annotated[
    str | None, typer.Option("--name", help="Name of the champion; without it, that of --config, else champion")
]
Aspects = Annotated[
    list[str] | None,
    typer.Option("--aspect", help="Ask about this aspect; may be repeated. Without it, about those found in the text"),
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="Target of a stance; twice for the two things that are compared"),
]
ArtifactKey = Annotated[str, typer.Argument(help="First digits of an artifact's key")]
OutDirectory = Annotated[
    Path | None,
    typer.Option(help="Where report and model are copied to; for a store on this disk, memmcl-runs/ID by default"),
]
ServerPort = Annotated[
    int | None, typer.Option(min=1, max=65535, help="Port of the run's Prefect server; a free one by default")
]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file with the run's settings")],
    set_: Overrides = None,
    out: OutDirectory = None,
    port: ServerPort = None,
) -> None:  # fmt: skip
    """Run the whole pipeline: rows, experts, merge search, contexts, evaluation, report.

    Run it again after a crash and it goes on where it was; run it again when finished and it returns at once.
    Uses the Prefect server named by PREFECT_API_URL, or starts one for the length of the run.

    For example:

    $ memmcl run deployments/configs/quickstart.yaml
    $ memmcl run my.yaml --set experts.steps=80 --set "data.subtasks=\\[sent2, irony]"
    $ memmcl run my.yaml --set store.url=s3://bucket/folder
    """
    settings = load_config(config, set_ or [])
    _quiet_environment()
    from tasks.inputs import find_inputs

    with console.status("reading data and base model"):
        inputs = find_inputs(settings)
        from tasks.session import finished, open_run, refuse_second

        opened = open_run(settings, inputs)
        done = finished(opened)
    if done is None:
        from flows.server import check_port, prefect_server

        refuse_second(opened)
        if port is not None:
            check_port(port)
        console.print(f"run {opened.id[:8]}, store {opened.store['url']}", soft_wrap=True)
        with prefect_server(port) as api:
            console.print(f"Prefect UI while it runs: {api.removesuffix('/api')}")
            from flows.pipeline import pipeline

            state = pipeline(settings, return_state=True)
        _raise_unless_done(state)
        done = finished(opened)
        assert done is not None, "the pipeline publishes the run's last artifact before it returns"
    else:
        console.print(f"run {opened.id[:8]} is finished; from the store:")
    _show(_open(settings), done, out)


@app.command()
def retrain(
    config: Annotated[Path, typer.Argument(help="YAML file with the run's settings")],
    set_: Overrides = None,
    port: ServerPort = None,
) -> None:  # fmt: skip
    """Retrain what new rows changed, and make the result champion if it is better; once, as the deployment does weekly.

    Ends as Promoted, NotPromoted or Unchanged, and says why.

    For example:

    $ memmcl retrain my.yaml
    $ memmcl champion show --config my.yaml
    """
    settings = load_config(config, set_ or [])
    _quiet_environment()
    from tasks.inputs import find_inputs

    with console.status("reading data and base model"):
        find_inputs(settings)  # mistakes show before a server starts
    from flows.server import check_port, prefect_server

    if port is not None:
        check_port(port)
    with prefect_server(port) as api:
        console.print(f"Prefect UI while it runs: {api.removesuffix('/api')}")
        from flows.retrain import retrain as flow

        state = flow(settings, return_state=True)
    _raise_unless_done(state)
    console.print(f"{state.name}: {state.message}", soft_wrap=True)


@app.command()
def report(
    run_id: Annotated[str | None, typer.Argument(help="First digits of a run's id; the latest run by default")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to copy the report and the model to")] = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Show a finished run: the results table, and the path of its report.

    For example:

    $ memmcl report
    $ memmcl report 3f9a --store s3://bucket/folder --out report
    """
    opened = _open(_settings(store, config))
    _show(opened, _find_run(opened, run_id), out)


@app.command()
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on")] = 4200) -> None:
    """Open the Prefect UI on this machine's run history (the runs that `memmcl run` made without PREFECT_API_URL)."""
    _quiet_environment()
    from flows.server import HOST, check_port, server_command, server_environment

    check_port(port)
    console.print(f"Prefect UI: http://{HOST}:{port}/runs  (Ctrl-C ends it)")
    command = server_command(port)
    os.execvpe(command[0], command, server_environment(port))  # signals reach the server itself


@app.command()
def predict(
    text: Annotated[str, typer.Argument(help="The text to analyse")],
    aspect: Aspects = None,
    target: Targets = None,
    run_id: RunId = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:  # fmt: skip
    """Answer every subtask about one text with a run's unified model, each in the context that its gate chose.

    For example:

    $ memmcl predict "The food was great, the wait was not."
    $ memmcl predict "The screen is sharp." --aspect screen --aspect battery
    """
    if not text.strip():
        raise UsageError("expected a text to analyse, got an empty one; put it in quotes behind `memmcl predict`")
    opened = _open(_settings(store, config))
    manifest = _find_run(opened, run_id)
    from flows.predict import answer_all

    with console.status("loading the unified model"):
        answers = answer_all(opened, manifest, text, aspects=aspect or [], targets=target or [])
    table = Table("subtask", "about", "answer", "confidence", box=None, header_style="bold")
    for answer in answers:
        table.add_row(answer.title, answer.about, answer.answer, answer.confidence)
    console.print(table)


@app.command()
def deploy(
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of a run: the default parameters of the deployments")
    ] = None,
    set_: Overrides = None,
    file: Annotated[Path, typer.Option("--file", help="The deployments, in Prefect's format")] = Path(
        "deployments/prefect.yaml"
    ),
) -> None:  # fmt: skip
    """Create work pool, deployments and automations on the Prefect server that PREFECT_API_URL names.

    Called again it changes nothing, until the file, the configuration or memmcl itself changes.

    For example:

    $ memmcl deploy --config my.yaml --set store.url=s3://bucket/folder
    """
    settings = load_config(config, set_ or [])
    _quiet_environment()
    from flows.deploy import deploy as apply

    with console.status("asking the Prefect server"):
        applied = apply(file, settings)
    table = Table("what", "name", "", box=None, header_style="bold")
    for one in applied:
        table.add_row(one.what, one.name, one.done)
    console.print(table)
    pools = " ".join(one.name for one in applied if one.what == "work pool")
    console.print(f"next           prefect worker start --pool {pools} --type process", soft_wrap=True)


@app.command()
def version() -> None:
    """Show the version."""
    console.print(__version__)


@champion_app.command("show")
def champion_show(name: ChampionName = None, store: StoreUrl = None, config: ConfigFile = None) -> None:
    """Show the champion: its results table, and the path of its report.

    For example:

    $ memmcl champion show --store s3://bucket/folder
    """
    opened, champions = _champions(name, store, config)
    reign = _current(opened, champions)
    console.print(f"champion {champions.name}: run {reign.run_id[:8]}, {reign.name}, since {reign.since}")
    console.print(f"{reign.how}: {reign.why}", soft_wrap=True)
    _show(opened, _find_run(opened, reign.run_id), None)


@champion_app.command("history")
def champion_history(name: ChampionName = None, store: StoreUrl = None, config: ConfigFile = None) -> None:
    """List every promotion and rollback, the newest first."""
    _, champions = _champions(name, store, config)
    table = Table("since", "run", "name", "how", "test score", "why", box=None, header_style="bold")
    for reign in reversed(champions.history):
        score = "" if reign.unified is None else f"{reign.unified:.3f} ± {reign.unified_se or 0:.3f}"
        table.add_row(reign.since[:16], reign.run_id[:8], reign.name, reign.how, score, reign.why)
    console.print(table)


@champion_app.command("rollback")
def champion_rollback(
    to: Annotated[str | None, typer.Option("--to", help="First digits of a former champion's run id")] = None,
    name: ChampionName = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Give the place back to the champion before the current one, or to the former champion named by --to.

    A retrain does not promote again what was rolled back, as long as data and settings stay the same.

    For example:

    $ memmcl champion rollback
    $ memmcl champion rollback --to 3f9a1c
    """
    from memmcl.store import rollback

    opened, champions = _champions(name, store, config)
    before = champions.current
    after = rollback(opened, champions, to).current
    assert before is not None
    assert after is not None
    console.print(f"champion {champions.name}: run {after.run_id[:8]}, {after.name} (was run {before.run_id[:8]})")


@store_app.command("ls")
def store_ls(
    kind: Annotated[str | None, typer.Argument(help="Only artifacts of this kind, as expert, search, run")] = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """List artifacts, the newest first.

    For example:

    $ memmcl store ls expert --store my-store
    """
    table = Table("kind", "key", "name", "created", "seconds", "size", box=None, header_style="bold")
    opened = _open(_settings(store, config))
    manifests = opened.list()
    kinds = sorted({manifest.kind for manifest in manifests})
    if kind is not None and kind not in kinds:
        raise UsageError(f"no artifact of kind {kind!r} in {opened.url}; kinds there: {', '.join(kinds) or 'none'}")
    for manifest in manifests:
        if kind not in {None, manifest.kind}:
            continue
        size = sum(blob.size for blob in manifest.blobs.values())
        table.add_row(
            manifest.kind,
            manifest.key[:12],
            manifest.name,
            manifest.created[:19],
            f"{manifest.seconds:.1f}",
            f"{size:,}",
        )
    console.print(table)


@store_app.command("show")
def store_show(key: ArtifactKey, store: StoreUrl = None, config: ConfigFile = None) -> None:
    """Show one artifact's manifest."""
    console.print_json(_find(_open(_settings(store, config)), key).model_dump_json())


@store_app.command("fetch")
def store_fetch(
    key: ArtifactKey,
    directory: Annotated[Path, typer.Argument(help="Where its files go")],
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Copy one artifact's files into a directory, every digest checked.

    For example:

    $ memmcl store fetch 3f9a1c ./adapter
    """
    opened = _open(_settings(store, config))
    console.print(str(opened.fetch(_find(opened, key), directory)), soft_wrap=True)


@store_app.command("verify")
def store_verify(store: StoreUrl = None, config: ConfigFile = None) -> None:
    """Read every artifact and check every digest; exit code 1 if anything is damaged.

    What is damaged counts as absent: the next `memmcl run` of its run makes it again.
    """
    found = _open(_settings(store, config)).verify()
    for problem in found.problems:
        console.print(Text.assemble((problem.where, "red"), ": ", problem.what), soft_wrap=True)
    console.print(
        f"{found.manifests} artifacts, {found.blobs} blobs, {found.bytes:,} bytes, {len(found.problems)} problems"
    )
    raise typer.Exit(1 if found.problems else 0)


def main() -> None:
    """Run the command line; errors are one line, exit code 2 for usage and 1 for failure."""
    try:
        app(prog_name="memmcl")
    except MemmclError as error:
        _fail(str(error), error.exit_code)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # typer's answer to Ctrl-C, which it keeps silent about
            _fail("interrupted; run the same command again to go on", INTERRUPTED)
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        _fail(f"unexpected {what}; this is a defect of memmcl, please report it {_kept(error)}", 1)


def _fail(message: str, code: int) -> NoReturn:
    line = Text.assemble(("error:", "red"), " ", " ".join(message.split()))
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)
    sys.exit(code)


def _kept(error: BaseException) -> str:
    """Write the error's traceback to a file of its own, and say where it is."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="memmcl-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return f"(its traceback could not be written to {tempfile.gettempdir()})"
    return f"with its traceback in {file.name}"


def _settings(store: str | None, config: Path | None) -> RunConfig:
    return load_config(config, [f"store.url={store}"] if store else [])


def _open(settings: RunConfig) -> Store:
    from memmcl.store import Store

    cfg = settings.store
    return Store.open(cfg.url, endpoint_url=cfg.endpoint_url, region=cfg.region)


def _champions(name: str | None, store: str | None, config: Path | None) -> tuple[Store, Champions]:
    from memmcl.store import read_champions

    settings = _settings(store, config)
    opened = _open(settings)
    return opened, read_champions(opened, name or settings.promotion.champion)


def _current(store: Store, champions: Champions) -> Reign:
    if champions.current is None:
        raise UsageError(f"no champion {champions.name!r} in {store.url} yet; the first retrain makes one")
    return champions.current


def _find(store: Store, key: str) -> Manifest:
    found = [manifest for manifest in store.list() if manifest.key.startswith(key)]
    if len(found) != 1:
        what = "no artifact has" if not found else f"{len(found)} artifacts have"
        raise UsageError(f"{what} a key that starts with {key!r} in {store.url}; `memmcl store ls` lists them")
    return found[0]


def _find_run(store: Store, run_id: str | None) -> Manifest:
    if run_id == CHAMPION:
        from memmcl.store import read_champions

        run_id = _current(store, read_champions(store, CHAMPION)).run_id
    runs = [manifest for manifest in store.list("run") if manifest.key.startswith(run_id or "")]
    if not runs:
        which = f"whose id starts with {run_id!r} " if run_id else ""
        raise UsageError(
            f"no finished run {which}in {store.url}; start one with `memmcl run CONFIG`, or name another --store"
        )
    return runs[0]


def _show(store: Store, done: Manifest, out: Path | None) -> None:
    """Print the results table and where to look further; copy report and model to `out`."""
    import json

    from memmcl.report import parse_results, results_table
    from memmcl.store.objects import write_file

    results = parse_results(json.loads(store.read(done, "results.json")))
    console.print(results_table(results, width=max(80, console.width)))
    if out is None and store.url.startswith("file://"):
        out = Path("memmcl-runs") / done.key[:8]
    if out is not None:
        store.fetch(done, out)
        for kind, name in (("unified", "adapter"), ("model", "model")):
            for ref in _made(done, kind):
                store.fetch(ref, out / name)
                write_file(out / name / "README.md", store.read(done, f"{name}.md"))
        console.print(f"unified model  {out / 'adapter'}")
        console.print(f"report         {out / 'report.html'}", soft_wrap=True)
    else:
        console.print(f"report         memmcl report {done.key[:8]} --store {store.url} --out DIR", soft_wrap=True)
    flow_run = done.metrics.get("flow_run_id")
    console.print(f"run history    memmcl ui  (flow run {flow_run})", soft_wrap=True)


def _raise_unless_done(state: State[Any]) -> None:
    if state.is_cancelled():
        console.print("the run was cancelled")
        raise typer.Exit(INTERRUPTED)
    state.result()


def _made(done: Manifest, kind: str) -> list[ArtifactRef]:
    return [ref for ref in done.inputs if ref.kind == kind]


def _quiet_environment() -> None:
    """Set what keeps libraries from phoning home and from talking over our own output."""
    for name, value in {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    main()
