"""The command ``jetkernels``: one module per subcommand, each with ``add_arguments(parser)`` and ``run(arguments)``."""
