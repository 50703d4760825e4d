"""Transport of requests to Triton over HTTP and gRPC, with TLS, retries and deadlines."""
