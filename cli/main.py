"""The command group, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from moesim.traces.errors import MoesimError

COMMANDS = {
    "record": ("moesim.cli.record", "record"),
    "trace": ("moesim.cli.trace", "trace"),
    "predict": ("moesim.cli.predict", "predict"),
    "simulate": ("moesim.cli.simulate", "simulate"),
    "sweep": ("moesim.cli.sweep", "sweep"),
    "tune": ("moesim.cli.tune", "tune"),
    "policy": ("moesim.cli.policy", "policy"),
    "explain": ("moesim.cli.explain", "explain"),
    "run-gpu": ("moesim.cli.run_gpu", "run_gpu"),
    "calibrate": ("moesim.cli.calibrate", "calibrate"),
    "profile": ("moesim.cli.profile", "profile"),
    "quality": ("moesim.cli.quality", "quality"),
    "compare": ("moesim.cli.compare", "compare"),
    "demo": ("moesim.cli.demo", "demo"),
}
"""Command name to module and function, in the order in which people use them; loaded when asked for."""

USAGE_ERROR = 2
INTERRUPTED = 130


class LazyGroup(click.Group):
    """Imports a command's module when the command is used, and reports every `MoesimError` in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command."""
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), function)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a `MoesimError`, or one of torch or the driver, ends it with a line on stderr and code 2."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of our output has gone (`moesim ... | head`): not an error of ours.
            sys.stderr.close()
            ctx.exit(0)
        except (MoesimError, RuntimeError, AssertionError, MemoryError, OSError) as error:
            if (known := _known(error)) is None:
                raise
            click.echo("Error: " + " ".join(str(known).split()), err=True)
            ctx.exit(USAGE_ERROR)
        except KeyboardInterrupt:
            click.echo("Interrupted: everything written so far is kept.", err=True)
            ctx.exit(INTERRUPTED)


def _known(error: BaseException) -> MoesimError | None:
    """The error as one of ours; None for a bug. Torch is asked only where the command has loaded it."""
    if isinstance(error, MoesimError):
        return error
    if "torch" not in sys.modules:
        return None
    from moesim.backend.failures import explained

    return explained(error)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="moesim")
def main() -> None:
    """Record a Mixture-of-Experts router, simulate expert policies on GPU queues, run the winner on real devices.

    \b
    moesim record --model models/switch-mini --text models/switch-mini/samples --out mini.moetrace
    moesim simulate mini.moetrace --policy all --profile 8xH100-NVLink --gpus 8
    moesim run-gpu models/switch-mini --trace mini.moetrace --policy predictive-batch --ranks 2
    """
