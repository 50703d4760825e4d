"""FastAPI server with ONNX Runtime, written in the usual way: a process per core, raw bytes in, JSON out, unbatched."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI, Request
from session import PORT, WORKERS, Student
from starlette.concurrency import run_in_threadpool

app = FastAPI()
student = Student()


@app.post("/predict")
async def predict(request: Request) -> list[float]:
    image = student.pixels(await request.body())
    return (await run_in_threadpool(student.logits, image[None]))[0].tolist()


if __name__ == "__main__":
    uvicorn.run("fastapi_server:app", host="127.0.0.1", port=PORT, workers=WORKERS, log_level="warning")
