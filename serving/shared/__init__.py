"""Errors, atomic writes, ports, logs, processes, priority, names of models: used by every package of serving."""
