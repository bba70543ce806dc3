"""FastAPI: enqueue in a handler; `uvicorn web_fastapi:app` serves it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException

from jobs import count_words
from omniq_sqlite import AsyncSQLiteBackend, TaskNotFoundError

backend = AsyncSQLiteBackend("jobs.db")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the file with the application, and close it with the application."""
    async with backend:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/counts", status_code=202)
async def start_count(text: str) -> dict[str, str]:
    """Enqueue; the task is on disk when the client has its answer."""
    return {"page": "/counts/" + await backend.enqueue(count_words.task(text))}


@app.get("/counts/{task_id}")
async def show_count(task_id: str) -> dict[str, object]:
    """Tell how the task ended, or that it has not."""
    try:
        result = await backend.result(task_id, timeout=0)
    except TaskNotFoundError:
        raise HTTPException(404) from None
    except TimeoutError:
        return {"status": await backend.status(task_id)}
    return {"status": result.status, "words": result.value}
