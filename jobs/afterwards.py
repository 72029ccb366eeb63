"""What follows a night: the morning page, what has gone by its time, the alerts on their way."""

from collections.abc import Callable

from rollsight.inspect.errors import UserError
from rollsight.jobs.alerts import send_due
from rollsight.jobs.morning_job import make_page
from rollsight.jobs.retention import retain
from rollsight.jobs.sites import Site


def follow_up(site: Site, *, worked: bool, retains: bool) -> list[UserError]:
    """Make the page where a night `worked`, take away what has gone by its time where `retains`, send alerts.

    What fails of these stops neither the others nor the night; the faults are returned.
    """
    steps: list[Callable[[], object]] = []
    if worked:
        steps.append(lambda: make_page(site))
    if worked and retains:
        steps.append(lambda: retain(site))
    steps.append(lambda: send_due(site))
    faults = []
    for step in steps:
        try:
            step()
        except UserError as fault:
            faults.append(fault)
        except OSError as fault:
            faults.append(UserError(f"{fault.filename or 'no file named'}: {fault.strerror or fault}"))
    return faults
