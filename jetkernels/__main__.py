"""``jetkernels`` and ``python -m jetkernels``."""

import argparse
import importlib
import os
import re
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Any, NoReturn

from jetkernels._startup import TRACEBACK
from jetkernels._version import __version__
from jetkernels.cli.options import UsageError, out_of_memory

COMMANDS = {
    "info": "what was built, and which backend serves which op on this machine",
    "demo": "train a small byte-level hybrid on Python's own source text and complete held-out code",
    "generate": "complete prompts with a checkpoint, or with random weights of a shipped config",
    "evaluate": "score a checkpoint in tasks of lm-evaluation-harness",
    "search": "turn a trained full-attention model into a Jet hybrid (PostNAS), stage by stage",
    "throughput": "measure prefill and decode tokens per second and the size of the cache; compare with full attention",
}
EPILOG = f"""exit codes: 0 done, 1 failed (a sentence on standard error says why), 2 wrong usage, 130 interrupted;
{TRACEBACK}=1 in the environment shows where a failure came from"""
LONGEST_MESSAGE = 1500
# What a wrong input, this machine or the file system can cause; anything else is a fault of the program.
EXPECTED = (OSError, ValueError, RuntimeError, MemoryError, ImportError)


class Parser(argparse.ArgumentParser):
    """Wrong usage ends with one line that names the option; nothing given, with the help."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        message = re.sub(r"^argument (\S+): must", r"\1 must", message).removeprefix("argument ")
        self.exit(2, f"{self.prog}: {_one_line(message)}; see {self.prog} --help\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own passes over a full disk.
        (file or sys.stderr).write(message)


def parser_for(argv: list[str]) -> argparse.ArgumentParser:
    """The parser of a command line. Only the command that it names is imported: the others have no options here."""
    parser = Parser(
        prog="jetkernels",
        description="JetBlock kernels and the hybrid model on them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jetkernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=Parser)
    named = command_of(argv)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == named:
            module = importlib.import_module(f"jetkernels.cli.{name}")
            command.description = (module.__doc__ or "").strip()
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def command_of(argv: list[str]) -> str | None:
    """The first word that is no option: none of those in front of it takes a value."""
    return next((word for word in argv if not word.startswith("-")), None)


def run(argv: list[str]) -> int:
    """Runs a command and returns its exit code; what goes wrong is raised."""
    parser = parser_for(argv)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    return arguments.run(arguments) or 0


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code; what goes wrong is said on standard error.

    Args:
        argv: the words behind `jetkernels`, by default those of this process.
    """
    if argv is None:
        argv = sys.argv[1:]
        _prepare_streams()
    name = command_of(argv)
    prog = f"jetkernels {name}" if name in COMMANDS else "jetkernels"
    try:
        try:
            code = run(argv)
        except SystemExit as end:  # of argparse: help, version, wrong usage
            assert isinstance(end.code, int)
            code = end.code
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        _drop_output()
        return 0
    except KeyboardInterrupt:
        _say(f"{prog}: interrupted")
        _drop_output()
        return 130
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        _say(f"{prog}: {sentence(error)}")
        _drop_output()
        return 2 if isinstance(error, UsageError) else 1


def sentence(error: Exception) -> str:
    """What an error says to people, in one line."""
    text = _one_line(str(error))
    if out_of_memory(error):
        size = re.search(r"tried to allocate (\d+) bytes", text, re.IGNORECASE) or re.search(
            r"tried to allocate ([\d.]+ \wiB)", text, re.IGNORECASE
        )
        tried = "" if size is None else f": tried to allocate {_size(size[1])}"
        return f"out of memory{tried}; fewer tokens or sequences at once, a narrower dtype or a smaller model need less"
    if not isinstance(error, EXPECTED):
        fault = f"this is a fault of jetkernels, and {TRACEBACK}=1 shows where it is"
        return f"unexpected {type(error).__name__}: {text}; {fault}"
    if isinstance(error, OSError) and error.strerror:
        name = _one_line(str(error.filename))
        name = name if len(name) <= 300 else f"{name[:300]}..."
        return f"{name}: {error.strerror}" if error.filename is not None else error.strerror
    return text or type(error).__name__


def _size(text: str) -> str:
    return f"{int(text) / 2**30:,.1f} GiB" if text.isdigit() else text


def _one_line(text: str) -> str:
    """Without line ends; of a message of torch, what is in front of its stack; cut where it gets too long to read."""
    text = " ".join(text.split("\nException raised from")[0].split())
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."


def _say(line: str) -> None:
    with suppress(OSError, ValueError):  # there may be nowhere left to say it
        print(line, file=sys.stderr, flush=True)


def _prepare_streams() -> None:
    """Makes standard input and output safe to use.

    A stream that was closed leads nowhere, or the first file opened would get its number and our output; a character
    that the terminal does not have is shown as a question mark.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def _drop_output() -> None:
    """What could not be written is not tried again when Python ends, which would complain."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        ours = sys.__stdout__
        if ours is not None and sys.stdout is ours:
            os.dup2(os.open(os.devnull, os.O_WRONLY), ours.fileno())


if __name__ == "__main__":
    sys.exit(main())
