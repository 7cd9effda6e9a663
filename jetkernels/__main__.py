"""``jetkernels`` and ``python -m jetkernels``."""

import argparse
import importlib
import sys

COMMANDS = {
    "info": "what was built, and which backend serves which op on this machine",
    "demo": "train a small byte-level hybrid on Python's own source text and complete held-out code",
    "generate": "complete a prompt with a checkpoint, or with random weights of a shipped config",
    "search": "turn a trained full-attention model into a Jet hybrid (PostNAS), stage by stage",
    "throughput": "measure prefill and decode tokens per second and the size of the cache",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jetkernels", description="JetBlock kernels and the hybrid model on them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"jetkernels.cli.{name}")
        command = commands.add_parser(name, help=summary, description=module.__doc__.strip())
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"jetkernels {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
