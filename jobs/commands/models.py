"""`inspect models`, `inspect models promote` and `rollback`."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rollsight.inspect.errors import UserError
from rollsight.jobs.commands.options import Home, Json

app = typer.Typer(pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def models(context: typer.Context, home: Home = None, as_json: Json = False) -> None:
    """List the models: the default and those of the plant; promote one, or roll back."""
    if context.invoked_subcommand is not None:
        context.obj = home  # `inspect models --home DIR promote X` means the same plant
        return
    from rollsight.inspect.models import model_names
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console

    plant = open_plant(home)
    found = []
    for name in model_names(plant.models):
        try:
            found.append((name, plant.model(name)))
        except UserError as fault:
            console.error(fault)  # one damaged model does not hide the others
    if as_json:
        for name, model in found:
            console.emit({"name": name, "card": model.card.model_dump(mode="json")})
        return
    rows = []
    for name, model in found:
        promoted = name == "default" and model.folder.parent.resolve() == plant.models.resolve()
        told = f"default: {model.card.name}" if promoted else name
        rows.append((told, model.card.net, " ".join(model.card.classes), model.hash[:12]))
    console.show_table("Models", ("name", "net", "classes", "hash"), rows)


@app.command()
def promote(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model of the plant.")],
    engine: Annotated[str, typer.Option(help="auto, onnx, openvino or torch.")] = "auto",
    by: Annotated[str | None, typer.Option(help="Who promotes it. Default: this user.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make NAME the default model where it passes every gate of gates.yaml; else tell which it does not."""
    from dataclasses import asdict

    from rollsight.inspect.plant import open_plant
    from rollsight.inspect.promotion import judge
    from rollsight.inspect.promotion import promote as promote_model
    from rollsight.jobs import console
    from rollsight.jobs.holds import whoever

    plant = open_plant(_home(context, home), standing=True)
    with console.count_progress(f"gates of {name}", "images") as on_done:
        model, verdicts = judge(plant, name, engine=engine, on_image=on_done)
    if as_json:
        passed = all(verdict.passed for verdict in verdicts)
        console.emit({"model": name, "promoted": passed, "gates": [asdict(verdict) for verdict in verdicts]})
    else:
        rows = [(v.data, v.gate, v.found, "open" if v.passed else "SHUT") for v in verdicts]
        console.show_table(f"Gates of {name}", ("data", "gate", "found", ""), rows)
    promote_model(plant, model, verdicts, by=by or whoever(), at=datetime.now(UTC))
    if not as_json:
        console.say(f"default is now {name}; closed rolls are due with it. Back: inspect models rollback")


@app.command()
def rollback(
    context: typer.Context,
    by: Annotated[str | None, typer.Option(help="Who rolls back. Default: this user.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Return to the model that was the default before."""
    from rollsight.inspect.plant import open_plant
    from rollsight.inspect.promotion import called, roll_back
    from rollsight.jobs import console
    from rollsight.jobs.holds import whoever

    plant = open_plant(_home(context, home), standing=True)
    step = roll_back(plant, by=by or whoever(), at=datetime.now(UTC))
    if as_json:
        console.emit({"default": called(step), "at": step.at, "by": step.by})
    else:
        console.say(f"default is now {called(step)}")


def _home(context: typer.Context, home: Path | None) -> Path | None:
    """The plant folder as given to the command, or before it to the group."""
    return home if home is not None else context.obj
