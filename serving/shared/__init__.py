"""Errors, atomic writes, ports, logs, processes, names of models: used by every package of serving."""
