"""The command `inspect`."""

import os
import signal
import sys

import typer
from rollsight.inspect.errors import FAILED, USAGE, UserError
from rollsight.jobs.commands import (
    compress,
    explain,
    jobs_more,
    judging,
    labels,
    models,
    rolls,
    scan,
    synth,
    training,
    weak,
)

INTERRUPTED = 130  # 128 + SIGINT, as a shell counts it

app = typer.Typer(
    help="Find and measure surface defects on whole rolls of steel strip.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    scan.demo,
    scan.scan,
    rolls.simulate,
    rolls.ingest,
    training.train,
    judging.evaluate,
    judging.compare,
    judging.calibrate,
    compress.compress,
    explain.explain,
    weak.weak,
):
    app.command()(command)
app.add_typer(labels.app, name="labels")
app.add_typer(jobs_more.app, name="jobs")
app.add_typer(rolls.app, name="rolls")
app.add_typer(models.app, name="models")
app.add_typer(synth.app, name="synth")


def main() -> None:
    """Run the command: a user's mistake is one line and an exit code, never a traceback.

    SIGTERM ends it as Ctrl-C does, so that what stops a service or a container leaves nothing half-made.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)
    except UserError as fault:
        print(f"inspect: {fault}", file=sys.stderr)
        code = fault.exit_code
    except typer.TyperException as fault:  # a command line that cannot be parsed
        # Without any argument the help was shown, and nothing is left to say.
        if message := " ".join(fault.format_message().split()).rstrip("."):
            print(f"inspect: {message}: see inspect --help", file=sys.stderr)
        code = USAGE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except OSError as fault:  # disk full, permission: the system's own words say what to do
        print(f"inspect: {fault.strerror or fault}: {fault.filename or 'no file named'}", file=sys.stderr)
        code = FAILED
    if code == INTERRUPTED:
        print(
            "inspect: interrupted; the same command goes on where it scans, ingests, learns or proves, "
            "else it starts over",
            file=sys.stderr,
        )
    sys.exit(code or 0)
