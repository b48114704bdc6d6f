"""The base below every other room. It imports nothing else of smolvla_edge.

Errors, files, child processes, facts about the machine, and what all command lines have in common.
"""
