"""Commands of the pipeline, one module per group of commands; `app` adds them to the application `tailor`."""
