"""Commands that the pipeline adds to `tailor`: one module each, named under `tailor.commands` in pyproject.toml."""
