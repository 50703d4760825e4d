"""The playground: a local web page (Gradio) that compares priors on a running server."""
