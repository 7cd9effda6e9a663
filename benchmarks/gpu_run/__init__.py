"""The first minutes on a GPU that is lent for a short time: one command, rows on disk at once, whatever breaks.

A supervisor starts children, each in a session of its own; nothing is ever restarted inside a broken process. See
benchmarks/README.md.
"""
