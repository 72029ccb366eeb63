"""`inspect models`."""

from rollsight.inspect.errors import UserError
from rollsight.jobs.commands.options import Home, Json


def models(home: Home = None, as_json: Json = False) -> None:
    """List the models: the shipped one and those of the plant."""
    from rollsight.inspect.models import CARD
    from rollsight.inspect.plant import open_plant
    from rollsight.jobs import console

    plant = open_plant(home)
    names = ["default", *sorted(path.parent.name for path in plant.models.glob(f"[!.]*/{CARD}"))]
    found = []
    for name in names:
        try:
            found.append((name, plant.model(name)))
        except UserError as fault:
            console.error(fault)  # one damaged model does not hide the others
    if as_json:
        for name, model in found:
            console.emit({"name": name, "card": model.card.model_dump(mode="json")})
        return
    rows = [(name, model.card.net, " ".join(model.card.classes), model.hash[:12]) for name, model in found]
    console.show_table("Models", ("name", "net", "classes", "hash"), rows)
