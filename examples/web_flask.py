"""Flask: enqueue in a view; `flask --app web_flask run` serves it."""

from flask import Flask, request
from flask.typing import ResponseReturnValue

from jobs import count_words
from omniq_sqlite import SQLiteBackend, TaskNotFoundError

app = Flask(__name__)
backend = SQLiteBackend("jobs.db")  # one for the process, for all of its threads


@app.post("/counts")
def start_count() -> ResponseReturnValue:
    """Enqueue; the task is on disk when the client has its answer."""
    task_id = backend.enqueue(count_words.task(request.form["text"]))
    return {"page": f"/counts/{task_id}"}, 202


@app.get("/counts/<task_id>")
def show_count(task_id: str) -> ResponseReturnValue:
    """Tell how the task ended, or that it has not."""
    try:
        result = backend.result(task_id, timeout=0)
    except TaskNotFoundError:
        return {}, 404
    except TimeoutError:
        return {"status": backend.status(task_id)}
    return {"status": result.status, "words": result.value}
