"""The base below every other room: errors, files, child processes, machine facts, the command line's common parts.

It imports nothing of smolvla_edge.
"""
